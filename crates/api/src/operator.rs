//! `install.istio.io`: the IstioOperator file. Only `meshConfig`, and of `values` whether namespaces
//! are injected by default, have an effect in the local mesh.

#![expect(missing_docs, reason = "a field is named and means what Istio's API reference says")]

use serde_json::Value;

use crate::mesh_config::MeshConfig;

records! {
    /// `IstioOperator`
    pub struct IstioOperator {
        pub profile: String,
        pub install_package_path: String,
        pub hub: String,
        pub tag: Option<Value>,
        pub namespace: String,
        pub revision: String,
        pub compatibility_version: String,
        pub mesh_config: Option<MeshConfig>,
        pub components: Option<Value>,
        pub values: Option<Value>,
        pub unvalidated_values: Option<Value>,
    }
}

impl IstioOperator {
    /// `values.sidecarInjectorWebhook.enableNamespacesByDefault`
    pub fn injects_by_default(&self) -> bool {
        let values = self.values.as_ref();
        values.is_some_and(|values| values["sidecarInjectorWebhook"]["enableNamespacesByDefault"] == true)
    }
}
