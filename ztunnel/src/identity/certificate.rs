//! A workload's certificate and what TLS needs of it. TLS 1.3 only, both sides authenticated, no
//! session resumption: a resumed session would carry an identity nobody has checked. The chain is
//! verified during the handshake; whose certificate it is, the caller compares afterwards with
//! [`Peer`], before a byte of the application moves.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use data_encoding::BASE64;
use rustls::{
    client::{
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
        verify_server_cert_signed_by_trust_anchor, Resumption,
    },
    crypto::{ring, CryptoProvider},
    pki_types::{pem::PemObject, CertificateDer, PrivateKeyDer, ServerName, UnixTime},
    server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier},
    ClientConfig, DigitallySignedStruct, RootCertStore, ServerConfig, SignatureScheme,
};
use serde::Serialize;
use thiserror::Error;
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

use super::Identity;
use crate::telemetry::access_log::timestamp;

const HTTP2: &[u8] = b"h2";

/// A certificate that cannot be used, and why.
#[derive(Debug, Error)]
pub enum CertificateError {
    #[error("the certificate authority answered {0} certificates; a leaf and a root are needed")]
    ShortChain(usize),
    #[error("unreadable PEM: {0}")]
    Pem(String),
    #[error("unreadable certificate: {0}")]
    X509(String),
    #[error("a certificate must name exactly one spiffe identity; this names {0:?}")]
    Subject(Vec<String>),
    #[error("asked for {expected}, the certificate is for {found}")]
    WrongIdentity {
        expected: Box<Identity>,
        found: Box<Identity>,
    },
    #[error(transparent)]
    Tls(#[from] rustls::Error),
    #[error("root certificates: {0}")]
    Roots(String),
}

/// One certificate with its key, as configurations for both roles of TLS.
#[derive(Debug)]
pub struct WorkloadCertificate {
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    /// Serial number in hexadecimal.
    pub serial: String,
    /// What is presented, leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Who is believed.
    pub roots: Vec<CertificateDer<'static>>,
    pub client: Arc<ClientConfig>,
    pub server: Arc<ServerConfig>,
}

impl WorkloadCertificate {
    /// Takes the chain of a certificate authority (leaf first, root last) for `identity`.
    ///
    /// Fails if the leaf is for someone else or does not belong to the key.
    pub fn from_chain(
        identity: &Identity,
        key: &PrivateKeyDer<'static>,
        chain: &[String],
    ) -> Result<Self, CertificateError> {
        let [presented @ .., root] = chain else {
            return Err(CertificateError::ShortChain(0));
        };
        if presented.is_empty() {
            return Err(CertificateError::ShortChain(1));
        }
        let presented = presented
            .iter()
            .map(|pem| parse_pem(pem.as_bytes()))
            .collect::<Result<Vec<_>, _>>()?
            .concat();
        let leaf = presented.first().ok_or(CertificateError::ShortChain(0))?;
        let found = Peer::of(leaf)?.identity;
        if found != *identity {
            return Err(CertificateError::WrongIdentity {
                expected: Box::new(identity.clone()),
                found: Box::new(found),
            });
        }
        let (_, parsed) = X509Certificate::from_der(leaf)
            .map_err(|error| CertificateError::X509(error.to_string()))?;
        let validity = parsed.validity();
        let (not_before, not_after) = (
            instant(validity.not_before.timestamp()),
            instant(validity.not_after.timestamp()),
        );
        let serial = serial(&parsed);
        let anchors = parse_pem(root.as_bytes())?;
        let roots = Arc::new(root_store(root.as_bytes())?);
        Ok(Self {
            not_before,
            not_after,
            serial,
            chain: presented.clone(),
            roots: anchors,
            client: Arc::new(client_config(
                roots.clone(),
                presented.clone(),
                key.clone_key(),
            )?),
            server: Arc::new(server_config(roots, presented, key.clone_key())?),
        })
    }

    /// Whether `now` lies after the end of its validity.
    pub fn expired(&self, now: SystemTime) -> bool {
        now >= self.not_after
    }

    /// When to ask for the next: half of its lifetime after it began.
    pub fn renew_at(&self) -> SystemTime {
        let lifetime = self
            .not_after
            .duration_since(self.not_before)
            .unwrap_or_default();
        self.not_before + lifetime / 2
    }
}

/// Who is at the other end, as its certificate says.
#[derive(Debug)]
pub struct Peer {
    pub identity: Identity,
    pub not_after: SystemTime,
}

impl Peer {
    /// Reads a certificate whose chain has been verified.
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, CertificateError> {
        let (_, parsed) = X509Certificate::from_der(certificate)
            .map_err(|error| CertificateError::X509(error.to_string()))?;
        Ok(Self {
            identity: identity(&parsed)?,
            not_after: instant(parsed.validity().not_after.timestamp()),
        })
    }
}

fn serial(parsed: &X509Certificate<'_>) -> String {
    parsed.raw_serial_as_string().replace(':', "")
}

/// A certificate as the admin interface shows it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct CertificateView {
    /// The PEM text, encoded once more, as Istio's ztunnel writes it.
    pem: String,
    serial_number: String,
    valid_from: String,
    expiration_time: String,
}

impl CertificateView {
    /// `None` for what is no certificate.
    pub fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
        let body = BASE64.encode(certificate);
        let mut pem = "-----BEGIN CERTIFICATE-----\n".to_owned();
        for line in body.as_bytes().chunks(64) {
            pem.push_str(&String::from_utf8_lossy(line));
            pem.push('\n');
        }
        pem.push_str("-----END CERTIFICATE-----\n");
        let validity = parsed.validity();
        Some(Self {
            pem: BASE64.encode(pem.as_bytes()),
            serial_number: format!("{:x}", parsed.serial),
            valid_from: timestamp(instant(validity.not_before.timestamp())),
            expiration_time: timestamp(instant(validity.not_after.timestamp())),
        })
    }
}

fn instant(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or(0))
}

/// The one identity a certificate is for.
fn identity(parsed: &X509Certificate<'_>) -> Result<Identity, CertificateError> {
    let names = parsed
        .subject_alternative_name()
        .map_err(|error| CertificateError::X509(error.to_string()))?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|extension| &extension.value.general_names)
        .filter_map(|name| match name {
            GeneralName::URI(uri) => Some(*uri),
            _ => None,
        })
        .collect();
    // SPIFFE X509-SVID, section 2: exactly one URI.
    match uris[..] {
        [uri] => uri
            .parse()
            .map_err(|_| CertificateError::Subject(vec![uri.to_owned()])),
        _ => Err(CertificateError::Subject(
            uris.into_iter().map(str::to_owned).collect(),
        )),
    }
}

/// Trust anchors from PEM text.
pub fn root_store(pem: &[u8]) -> Result<RootCertStore, CertificateError> {
    let mut roots = RootCertStore::empty();
    for certificate in parse_pem(pem)? {
        roots.add(certificate)?;
    }
    if roots.is_empty() {
        return Err(CertificateError::Roots("no certificate found".to_owned()));
    }
    Ok(roots)
}

/// The algorithms of every TLS session: those of ring, the cheapest strong cipher first.
pub fn crypto_provider() -> Arc<CryptoProvider> {
    Arc::new(CryptoProvider {
        cipher_suites: vec![
            ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
            ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
            ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        ],
        ..ring::default_provider()
    })
}

fn parse_pem(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, CertificateError> {
    CertificateDer::pem_slice_iter(pem)
        .collect::<Result<_, _>>()
        .map_err(|error| CertificateError::Pem(error.to_string()))
}

fn client_config(
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ClientConfig, CertificateError> {
    let provider = crypto_provider();
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ChainVerifier { roots, provider }))
        .with_client_auth_cert(chain, key)?;
    config.alpn_protocols = vec![HTTP2.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

fn server_config(
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
) -> Result<ServerConfig, CertificateError> {
    let provider = crypto_provider();
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider.clone())
        .build()
        .map_err(|error| CertificateError::Roots(error.to_string()))?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)?;
    config.alpn_protocols = vec![HTTP2.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

/// Verifies that a server's chain leads to the mesh's root. Mesh certificates carry no DNS names;
/// the identity is compared by the caller.
#[derive(Debug)]
struct ChainVerifier {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for ChainVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let certificate = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(
            &certificate,
            &self.roots,
            intermediates,
            now,
            self.provider.signature_verification_algorithms.all,
        )?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 is required".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(
            message,
            certificate,
            signature,
            &self.provider.signature_verification_algorithms,
        )
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider
            .signature_verification_algorithms
            .supported_schemes()
    }
}
