//! L4 authorization: may this connection pass? Pure. A policy's rules are alternatives; within a
//! rule all clauses must hold, within a clause any match, within a match every field that is set.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use serde::Serialize;

use crate::identity::Identity;

/// Which workloads a policy governs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Scope {
    Global,
    Namespace,
    WorkloadSelector,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub enum Action {
    Allow,
    Deny,
}

/// One authorization policy, as the control plane compiled it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Policy {
    pub name: Arc<str>,
    pub namespace: Arc<str>,
    pub scope: Scope,
    pub action: Action,
    pub rules: Vec<Rule>,
    /// Only report what it would do.
    pub dry_run: bool,
}

/// Holds if all its clauses do.
pub type Rule = Vec<Clause>;
/// Holds if any of its matches does, or if it has none.
pub type Clause = Vec<Match>;

/// Conditions on one connection; an empty one never holds.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Match {
    pub namespaces: Values<StringMatch>,
    pub principals: Values<StringMatch>,
    pub service_accounts: Values<ServiceAccount>,
    pub source_ips: Values<Block>,
    pub destination_ips: Values<Block>,
    pub destination_ports: Values<u16>,
}

/// Values of one field: one of `any` if there are some, and none of `none`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Values<T> {
    pub any: Vec<T>,
    pub none: Vec<T>,
}

impl<T> Default for Values<T> {
    fn default() -> Self {
        Self {
            any: vec![],
            none: vec![],
        }
    }
}

impl<T> Values<T> {
    fn hold(&self, matches: impl Fn(&T) -> bool) -> bool {
        (self.any.is_empty() || self.any.iter().any(&matches)) && !self.none.iter().any(&matches)
    }

    fn is_empty(&self) -> bool {
        self.any.is_empty() && self.none.is_empty()
    }
}

/// A condition on a string that may be absent; an absent string matches nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub enum StringMatch {
    Exact(Arc<str>),
    Prefix(Arc<str>),
    Suffix(Arc<str>),
    Presence,
}

impl StringMatch {
    fn matches(&self, value: Option<&str>) -> bool {
        value.is_some_and(|value| match self {
            Self::Exact(text) => value == &**text,
            Self::Prefix(text) => value.starts_with(&**text),
            Self::Suffix(text) => value.ends_with(&**text),
            Self::Presence => !value.is_empty(),
        })
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceAccount {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

/// A block of addresses in CIDR form.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block {
    address: IpAddr,
    length: u8,
}

impl Block {
    /// `None` if the length is more than the address has bits.
    pub fn new(address: IpAddr, length: u8) -> Option<Self> {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        (length <= bits).then_some(Self { address, length })
    }

    /// Whether `address` lies in the block.
    pub fn contains(&self, address: IpAddr) -> bool {
        let length = u32::from(self.length);
        match (self.address, address.to_canonical()) {
            (IpAddr::V4(block), IpAddr::V4(address)) => {
                let differing = block.to_bits() ^ address.to_bits();
                differing.checked_shr(32 - length).unwrap_or(0) == 0
            }
            (IpAddr::V6(block), IpAddr::V6(address)) => {
                let differing = block.to_bits() ^ address.to_bits();
                differing.checked_shr(128 - length).unwrap_or(0) == 0
            }
            _ => false,
        }
    }
}

impl Serialize for Block {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{}/{}", self.address, self.length))
    }
}

/// What a policy judges: a connection to a workload of this node.
#[derive(Debug, Clone)]
pub struct Connection {
    pub source: IpAddr,
    /// Who the peer proved to be; `None` for plaintext.
    pub identity: Option<Identity>,
    pub destination: SocketAddr,
}

/// The judgement over all policies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// By the ALLOW policy that matches, or because there is none.
    Allowed(Option<Arc<Policy>>),
    /// A DENY policy matches.
    DeniedBy(Arc<Policy>),
    /// There are ALLOW policies, these, and none matches.
    NotAllowedBy(Vec<Arc<Policy>>),
}

impl Decision {
    pub fn allows(&self) -> bool {
        matches!(self, Self::Allowed(_))
    }

    /// The policies that made the decision.
    pub fn policies(&self) -> &[Arc<Policy>] {
        match self {
            Self::Allowed(by) => by.as_slice(),
            Self::DeniedBy(by) => std::slice::from_ref(by),
            Self::NotAllowedBy(by) => by,
        }
    }
}

/// Why a decision refuses.
impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Allowed(_) => f.write_str("allowed"),
            Self::DeniedBy(policy) => write!(f, "explicitly denied by: {}", policy.key()),
            Self::NotAllowedBy(policies) => {
                f.write_str("allow policies exist, but none allowed: ")?;
                for (number, policy) in policies.iter().enumerate() {
                    let separator = if number == 0 { "" } else { ", " };
                    write!(f, "{separator}{}", policy.key())?;
                }
                Ok(())
            }
        }
    }
}

/// What the policies say of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Judgement {
    pub decision: Decision,
    /// What would have refused it, had dry-run policies been in force; `None` if nothing or if it
    /// is refused anyway.
    pub dry_run: Option<Decision>,
}

/// Judges a connection: any matching DENY refuses, then, if there are ALLOW policies, one must
/// match. Dry-run policies decide nothing.
pub fn judge(policies: &[Arc<Policy>], connection: &Connection) -> Judgement {
    let subject = Subject::of(connection);
    let decision = decide(policies.iter().filter(|policy| !policy.dry_run), &subject);
    let shadowed = policies.iter().any(|policy| policy.dry_run) && decision.allows();
    let dry_run = shadowed
        .then(|| decide(policies.iter(), &subject))
        .filter(|decision| !decision.allows());
    Judgement { decision, dry_run }
}

fn decide<'a>(
    policies: impl Iterator<Item = &'a Arc<Policy>> + Clone,
    subject: &Subject<'_>,
) -> Decision {
    let of = |action| {
        policies
            .clone()
            .filter(move |policy| policy.action == action)
    };
    if let Some(policy) = of(Action::Deny).find(|policy| policy.matches(subject)) {
        return Decision::DeniedBy(policy.clone());
    }
    if let Some(policy) = of(Action::Allow).find(|policy| policy.matches(subject)) {
        return Decision::Allowed(Some(policy.clone()));
    }
    let allowing: Vec<_> = of(Action::Allow).cloned().collect();
    if allowing.is_empty() {
        return Decision::Allowed(None);
    }
    Decision::NotAllowedBy(allowing)
}

/// A connection with what matches compare, computed once.
struct Subject<'a> {
    connection: &'a Connection,
    principal: Option<String>,
}

impl<'a> Subject<'a> {
    fn of(connection: &'a Connection) -> Self {
        Self {
            connection,
            principal: connection.identity.as_ref().map(Identity::principal),
        }
    }
}

impl Policy {
    /// `NAMESPACE/NAME`.
    pub fn key(&self) -> String {
        format!("{}/{}", self.namespace, self.name)
    }

    fn matches(&self, subject: &Subject<'_>) -> bool {
        let clause_holds =
            |clause: &Clause| clause.is_empty() || clause.iter().any(|one| one.matches(subject));
        self.rules.iter().any(|rule| rule.iter().all(clause_holds))
    }
}

impl Match {
    fn is_empty(&self) -> bool {
        self.namespaces.is_empty()
            && self.principals.is_empty()
            && self.service_accounts.is_empty()
            && self.source_ips.is_empty()
            && self.destination_ips.is_empty()
            && self.destination_ports.is_empty()
    }

    fn matches(&self, subject: &Subject<'_>) -> bool {
        let connection = subject.connection;
        let identity = connection.identity.as_ref();
        let namespace = identity.map(|identity| &*identity.namespace);
        !self.is_empty()
            && self.namespaces.hold(|one| one.matches(namespace))
            && self
                .principals
                .hold(|one| one.matches(subject.principal.as_deref()))
            && self.service_accounts.hold(|account| {
                identity.is_some_and(|identity| {
                    identity.namespace == account.namespace
                        && identity.service_account == account.name
                })
            })
            && self
                .source_ips
                .hold(|block| block.contains(connection.source))
            && self
                .destination_ips
                .hold(|block| block.contains(connection.destination.ip()))
            && self
                .destination_ports
                .hold(|port| *port == connection.destination.port())
    }
}

#[cfg(test)]
mod tests;
