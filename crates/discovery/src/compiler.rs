//! From a snapshot and a proxy's facts to its resources.

use std::sync::Arc;

use compile::View;
use envoy_types::pb::google::protobuf::Any;
use mesh::MeshSnapshot;
use types::Finding;

/// What one proxy should have, and what is wrong with it.
#[derive(Clone, Debug, Default)]
pub struct Compiled {
    /// Name and message.
    pub resources: Vec<(String, Any)>,
    /// What only shows for this proxy.
    pub findings: Vec<Finding>,
}

/// Compiles. A seam: tests have small compilers of their own.
pub trait Compiler: Send + Sync + 'static {
    /// Pure; may take long, and is called where blocking is allowed.
    fn compile(&self, snapshot: &MeshSnapshot, view: &View) -> Compiled;
}

/// Looks at what was compiled before it is pushed: the place where the engine lowers it.
pub type Vet = Arc<dyn Fn(&View, &[compile::Resource]) -> Vec<Finding> + Send + Sync>;

/// The compiler of this mesh.
#[derive(Clone, Default)]
pub struct MeshCompiler {
    /// Runs after compiling; its findings are shown with the others.
    pub vet: Option<Vet>,
}

impl MeshCompiler {
    /// The compiler that also says what Lateen's own proxies would refuse.
    pub fn vetted() -> Self {
        Self { vet: Some(Arc::new(explain::vet_packed)) }
    }
}

impl Compiler for MeshCompiler {
    fn compile(&self, snapshot: &MeshSnapshot, view: &View) -> Compiled {
        let mut compiled = compile::compile(snapshot, view);
        let packed = compiled.packed();
        if let Some(vet) = &self.vet {
            compiled.findings.extend(vet(view, &packed));
        }
        let resources = packed.into_iter().map(|resource| (resource.name, resource.any)).collect();
        Compiled { resources, findings: compiled.findings }
    }
}
