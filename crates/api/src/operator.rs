//! `install.istio.io`: the IstioOperator file. Only `meshConfig` has an effect in the local mesh.

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
