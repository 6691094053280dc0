//! A root of its own for tests and benchmarks that run without a control plane: `ca.crt` and
//! `ca.key` in a directory that several proxies share. Made by whoever comes first. Roots in
//! `other-roots.crt` are trusted beside it.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SerialNumber,
};

/// Certificates begin a little in the past, for peers whose clocks are behind.
const CLOCK_SKEW: Duration = Duration::from_secs(120);
const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 24 * 3600);

/// A certificate authority in this process.
pub struct LocalRoot {
    directory: PathBuf,
}

impl LocalRoot {
    /// Opens the root in `directory`, making it under a lock if it is not there.
    pub fn open(directory: &Path) -> io::Result<Self> {
        fs::create_dir_all(directory)?;
        let lock = File::create(directory.join(".lock"))?;
        lock.lock()?;
        let (certificate_file, key_file) = (directory.join("ca.crt"), directory.join("ca.key"));
        if !certificate_file.exists() {
            let (certificate, key) = make_root().map_err(io::Error::other)?;
            OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&key_file)?
                .write_all(key.as_bytes())?;
            fs::write(&certificate_file, certificate)?;
        }
        Self::read(directory)?;
        Ok(Self {
            directory: directory.to_owned(),
        })
    }

    /// The issuer, and the PEM of all trusted roots.
    fn read(directory: &Path) -> io::Result<(Issuer<'static, KeyPair>, String)> {
        let certificate = fs::read_to_string(directory.join("ca.crt"))?;
        let key = KeyPair::from_pem(&fs::read_to_string(directory.join("ca.key"))?)
            .map_err(io::Error::other)?;
        let issuer = Issuer::from_ca_cert_pem(&certificate, key).map_err(io::Error::other)?;
        let others = fs::read_to_string(directory.join("other-roots.crt")).unwrap_or_default();
        Ok((issuer, certificate + &others))
    }

    /// Signs a request as it stands; answers leaf and roots in PEM. Reads the files again, so
    /// that a root can be replaced while proxies run.
    pub fn sign(&self, csr: &str, ttl: Duration) -> io::Result<Vec<String>> {
        let (issuer, roots) = Self::read(&self.directory)?;
        let mut request =
            CertificateSigningRequestParams::from_pem(csr).map_err(io::Error::other)?;
        let now = SystemTime::now();
        let params = &mut request.params;
        params.not_before = (now - CLOCK_SKEW).into();
        params.not_after = (now + ttl).into();
        params.serial_number = Some(SerialNumber::from(rand::random::<u64>() >> 1));
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let leaf = request.signed_by(&issuer).map_err(io::Error::other)?;
        Ok(vec![leaf.pem(), roots])
    }
}

fn make_root() -> Result<(String, String), rcgen::Error> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params
        .distinguished_name
        .push(DnType::OrganizationName, "Meshlight test root");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![
        KeyUsagePurpose::KeyCertSign,
        KeyUsagePurpose::DigitalSignature,
    ];
    let now = SystemTime::now();
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = (now + ROOT_LIFETIME).into();
    let certificate = params.self_signed(&key)?;
    Ok((certificate.pem(), key.serialize_pem()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::{certificate::WorkloadCertificate, Identity};
    use rcgen::SanType;
    use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};

    fn certificate(
        asked: &Identity,
        subject: &[&str],
    ) -> Result<WorkloadCertificate, crate::identity::certificate::CertificateError> {
        let directory = std::env::temp_dir().join(format!("root-{}", rand::random::<u64>()));
        let root = LocalRoot::open(&directory).unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.subject_alt_names = subject
            .iter()
            .map(|uri| SanType::URI((*uri).try_into().unwrap()))
            .collect();
        let csr = params.serialize_request(&key).unwrap().pem().unwrap();
        let chain = root.sign(&csr, Duration::from_secs(3600)).unwrap();
        fs::remove_dir_all(directory).unwrap();
        let key = PrivateKeyDer::from(PrivatePkcs8KeyDer::from(key.serialize_der()));
        WorkloadCertificate::from_chain(asked, &key, &chain)
    }

    #[test]
    fn a_signed_certificate_is_renewed_at_half_its_life() {
        let me = Identity::new("cluster.local", "shop", "cart");
        let made = certificate(&me, &[&me.to_string()]).unwrap();
        let left = made.renew_at().duration_since(SystemTime::now()).unwrap();
        assert!(left > Duration::from_secs(1700) && left < Duration::from_secs(1800));
        assert!(!made.expired(SystemTime::now()));
        assert!(made.expired(SystemTime::now() + Duration::from_secs(3601)));
    }

    #[test]
    fn a_certificate_for_someone_else_is_refused() {
        let me = Identity::new("cluster.local", "shop", "cart");
        let other = "spiffe://cluster.local/ns/shop/sa/other";
        assert!(certificate(&me, &[other]).is_err());
        assert!(certificate(&me, &[&me.to_string(), other]).is_err());
        assert!(certificate(&me, &[]).is_err());
    }
}
