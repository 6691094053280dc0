//! Where certificates are signed: by istiod over gRPC, or, for tests and benchmarks without a
//! control plane, by a root that several proxies share as two files. The private key is made here
//! and never leaves the process.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use prost_types::{value::Kind, Struct, Value};
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use thiserror::Error;

use super::{
    certificate::{CertificateError, WorkloadCertificate},
    local_root::LocalRoot,
    Identity,
};
use crate::{
    config::{CaSource, Config},
    grpc::{Endpoint, GrpcError, Metadata},
    proto::auth::{IstioCertificateRequest, IstioCertificateResponse},
};

const CREATE_CERTIFICATE: &str = "/istio.v1.auth.IstioCertificateService/CreateCertificate";
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);

/// Why no certificate came.
#[derive(Debug, Error)]
pub enum AuthorityError {
    #[error("certificate request: {0}")]
    Request(#[from] rcgen::Error),
    #[error("istiod's certificate service: {0}")]
    Remote(#[from] GrpcError),
    #[error("istiod's certificate service did not answer within {} s", REQUEST_TIMEOUT.as_secs())]
    Timeout,
    #[error("local root in {directory}: {error}")]
    LocalRoot {
        directory: PathBuf,
        error: std::io::Error,
    },
    #[error("signing with the local root: {0}")]
    Signing(std::io::Error),
    #[error(transparent)]
    Certificate(#[from] CertificateError),
}

/// Signs certificates for the identities of this node's pods.
pub struct Authority {
    signer: Signer,
    ttl: Duration,
}

enum Signer {
    Remote {
        endpoint: Endpoint,
        token: PathBuf,
        cluster_id: String,
    },
    Local(Box<LocalRoot>),
}

impl Authority {
    /// Prepares the source named in the configuration; a local root is made if it is not there.
    pub fn new(config: &Config) -> Result<Self, AuthorityError> {
        let signer = match &config.ca {
            CaSource::Remote { address, root } => Signer::Remote {
                endpoint: Endpoint::new(address, root)?,
                token: config.token.clone(),
                cluster_id: config.cluster_id.clone(),
            },
            CaSource::Local { directory } => {
                let root =
                    LocalRoot::open(directory).map_err(|error| AuthorityError::LocalRoot {
                        directory: directory.clone(),
                        error,
                    })?;
                Signer::Local(Box::new(root))
            }
        };
        Ok(Self {
            signer,
            ttl: config.certificate_ttl,
        })
    }

    /// Makes a key and has a certificate for `identity` signed.
    pub async fn issue(&self, identity: &Identity) -> Result<WorkloadCertificate, AuthorityError> {
        let key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(identity.to_string().try_into()?)];
        let request = params.serialize_request(&key)?.pem()?;
        let chain = match &self.signer {
            Signer::Local(root) => root
                .sign(&request, self.ttl)
                .map_err(AuthorityError::Signing)?,
            Signer::Remote {
                endpoint,
                token,
                cluster_id,
            } => {
                let call = sign_remotely(endpoint, token, cluster_id, identity, request, self.ttl);
                tokio::time::timeout(REQUEST_TIMEOUT, call)
                    .await
                    .map_err(|_| AuthorityError::Timeout)??
            }
        };
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok(WorkloadCertificate::from_chain(identity, &key, &chain)?)
    }
}

async fn sign_remotely(
    endpoint: &Endpoint,
    token: &Path,
    cluster_id: &str,
    identity: &Identity,
    csr: String,
    ttl: Duration,
) -> Result<Vec<String>, AuthorityError> {
    let impersonated = Value {
        kind: Some(Kind::StringValue(identity.to_string())),
    };
    let request = IstioCertificateRequest {
        csr,
        validity_duration: i64::try_from(ttl.as_secs()).unwrap_or(i64::MAX),
        metadata: Some(Struct {
            fields: [("ImpersonatedIdentity".to_owned(), impersonated)].into(),
        }),
    };
    let metadata = Metadata::with_token(token)?.and("clusterid", cluster_id)?;
    let channel = endpoint.connect().await?;
    let response: IstioCertificateResponse = channel
        .unary(CREATE_CERTIFICATE, &metadata, &request)
        .await?;
    Ok(response.cert_chain)
}
