//! The certificate service, as Istio's agents call it.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use envoy_types::pb::google::protobuf::value::Kind;
use identity::agent::describe;
use proto::ca::istio_certificate_service_server::IstioCertificateService;
use proto::ca::{IstioCertificateRequest, IstioCertificateResponse};
use telemetry::registry::Registry;
use tokio::sync::watch;
use tonic::{Request, Response, Status};

use super::{Ca, SignError};
use crate::authn::Authn;
use crate::listen::Connection;

/// Signs for authenticated callers.
pub struct CertificateService {
    ca: watch::Receiver<Arc<Ca>>,
    authn: Arc<Authn>,
    metrics: Registry,
}

impl fmt::Debug for CertificateService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CertificateService").field("ca", &*self.ca.borrow()).finish_non_exhaustive()
    }
}

impl CertificateService {
    /// A service over the CA of each moment.
    pub fn new(ca: watch::Receiver<Arc<Ca>>, authn: Arc<Authn>, metrics: Registry) -> Self {
        Self { ca, authn, metrics }
    }
}

#[tonic::async_trait]
impl IstioCertificateService for CertificateService {
    async fn create_certificate(
        &self,
        request: Request<IstioCertificateRequest>,
    ) -> Result<Response<IstioCertificateResponse>, Status> {
        self.metrics.count("citadel_server_csr_count", &[]);
        let connection = request.extensions().get::<Connection>().cloned().unwrap_or_default();
        let caller = self.authn.caller(&connection, request.metadata()).await.map_err(|refused| {
            self.metrics.count("citadel_server_authentication_failure_count", &[]);
            tracing::info!(peer = ?connection.peer, reason = %describe(&refused), "certificate refused");
            // The reason stays here: who is not authenticated learns nothing about why.
            Status::unauthenticated("request authenticate failure")
        })?;
        let request = request.into_inner();
        let impersonates = request.metadata.as_ref().and_then(|metadata| metadata.fields.get("ImpersonatedIdentity"));
        if let Some(Kind::StringValue(wanted)) = impersonates.and_then(|value| value.kind.as_ref())
            && !wanted.is_empty()
        {
            self.metrics.count("citadel_server_authentication_failure_count", &[]);
            return Err(Status::unauthenticated("request impersonation authentication failure"));
        }
        let lifetime = u64::try_from(request.validity_duration)
            .map(Duration::from_secs)
            .map_err(|_| Status::invalid_argument("validity_duration is negative"))?;
        let ca = Arc::clone(&self.ca.borrow());
        let id = caller.id.clone();
        let signed = tokio::task::spawn_blocking(move || ca.sign(&request.csr, &id, lifetime, SystemTime::now())).await;
        let signed = signed.map_err(|_| Status::internal("signing was cancelled"))?;
        let issued = signed.map_err(|error| {
            let text = describe(&error);
            tracing::info!(id = %caller.id, error = text, "certificate not signed");
            match error {
                SignError::Request(_) | SignError::TooLong | SignError::WeakKey(_) => {
                    self.metrics.count("citadel_server_csr_parsing_err_count", &[]);
                    Status::invalid_argument(text)
                }
                SignError::Lifetime { .. } => {
                    self.metrics.count("citadel_server_csr_sign_err_count", &[("error", "TTL_ERROR")]);
                    Status::invalid_argument(text)
                }
                SignError::Expired | SignError::Sign(_) | SignError::Random | SignError::Unusable(_) => {
                    self.metrics.count("citadel_server_csr_sign_err_count", &[("error", "CERT_GEN_ERROR")]);
                    Status::internal(text)
                }
            }
        })?;
        self.metrics.count("citadel_server_success_cert_issuance_count", &[]);
        tracing::debug!(id = %caller.id, by = caller.by, "certificate issued");
        let mut cert_chain = issued.chain;
        cert_chain.push(issued.roots);
        Ok(Response::new(IstioCertificateResponse { cert_chain }))
    }
}
