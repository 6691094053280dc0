//! L4 authorization: may this connection pass? Pure. A policy's rules are alternatives; within a
//! rule all clauses must hold, within a clause any match, within a match every field that is set.

use std::{
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
    Allowed,
    /// A DENY policy, by `NAMESPACE/NAME`, matches.
    DeniedBy(String),
    /// There are ALLOW policies, these, and none matches.
    NotAllowedBy(Vec<String>),
}

/// Judges a connection: any matching DENY refuses, then, if there are ALLOW policies, one must
/// match. `dry_run` hears of dry-run policies that match; they decide nothing.
pub fn decide(
    policies: &[Arc<Policy>],
    connection: &Connection,
    mut dry_run: impl FnMut(&Policy),
) -> Decision {
    let subject = Subject::of(connection);
    let mut effective = Vec::with_capacity(policies.len());
    for policy in policies {
        if !policy.dry_run {
            effective.push(policy);
        } else if policy.matches(&subject) {
            dry_run(policy);
        }
    }
    let of = |action| {
        effective
            .iter()
            .filter(move |policy| policy.action == action)
    };
    if let Some(policy) = of(Action::Deny).find(|policy| policy.matches(&subject)) {
        return Decision::DeniedBy(policy.key());
    }
    if of(Action::Allow).count() == 0 || of(Action::Allow).any(|policy| policy.matches(&subject)) {
        return Decision::Allowed;
    }
    Decision::NotAllowedBy(of(Action::Allow).map(|policy| policy.key()).collect())
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
mod tests {
    use super::*;

    fn connection(identity: Option<(&str, &str)>) -> Connection {
        Connection {
            source: "10.244.1.5".parse().unwrap(),
            identity: identity
                .map(|(namespace, account)| Identity::new("cluster.local", namespace, account)),
            destination: "10.244.2.7:8080".parse().unwrap(),
        }
    }

    fn policy(name: &str, action: Action, rules: Vec<Rule>) -> Arc<Policy> {
        Arc::new(Policy {
            name: name.into(),
            namespace: "shop".into(),
            scope: Scope::Namespace,
            action,
            rules,
            dry_run: false,
        })
    }

    fn one(condition: Match) -> Vec<Rule> {
        vec![vec![vec![condition]]]
    }

    fn any<T>(values: Vec<T>) -> Values<T> {
        Values {
            any: values,
            none: vec![],
        }
    }

    fn none<T>(values: Vec<T>) -> Values<T> {
        Values {
            any: vec![],
            none: values,
        }
    }

    fn from_namespace(namespace: &str) -> Match {
        Match {
            namespaces: any(vec![StringMatch::Exact(namespace.into())]),
            ..Match::default()
        }
    }

    fn to_port(port: u16) -> Match {
        Match {
            destination_ports: any(vec![port]),
            ..Match::default()
        }
    }

    fn strict() -> Arc<Policy> {
        policy(
            "istio_converted_static_strict",
            Action::Deny,
            one(Match {
                principals: none(vec![StringMatch::Presence]),
                ..Match::default()
            }),
        )
    }

    fn judge(policies: &[Arc<Policy>], connection: &Connection) -> Decision {
        decide(policies, connection, |_| panic!("no dry run here"))
    }

    #[test]
    fn without_policies_everything_passes() {
        assert_eq!(judge(&[], &connection(None)), Decision::Allowed);
    }

    #[test]
    fn strict_refuses_only_those_without_identity() {
        let strict = [strict()];
        assert_eq!(
            judge(&strict, &connection(None)),
            Decision::DeniedBy("shop/istio_converted_static_strict".into())
        );
        assert_eq!(
            judge(&strict, &connection(Some(("a", "b")))),
            Decision::Allowed
        );
    }

    #[test]
    fn deny_wins_over_allow() {
        let policies = [
            policy("yes", Action::Allow, one(from_namespace("web"))),
            policy("no", Action::Deny, one(to_port(8080))),
        ];
        let from_web = connection(Some(("web", "front")));
        assert_eq!(
            judge(&policies, &from_web),
            Decision::DeniedBy("shop/no".into())
        );
    }

    #[test]
    fn with_an_allow_policy_the_others_are_refused() {
        let policies = [policy("yes", Action::Allow, one(from_namespace("web")))];
        assert_eq!(
            judge(&policies, &connection(Some(("web", "front")))),
            Decision::Allowed
        );
        for other in [connection(Some(("bank", "x"))), connection(None)] {
            assert_eq!(
                judge(&policies, &other),
                Decision::NotAllowedBy(vec!["shop/yes".into()])
            );
        }
    }

    #[test]
    fn a_policy_without_rules_matches_nothing() {
        let from_web = connection(Some(("web", "front")));
        let allow_nothing = [policy("allow-nothing", Action::Allow, vec![])];
        assert!(matches!(
            judge(&allow_nothing, &from_web),
            Decision::NotAllowedBy(_)
        ));
        let deny_nothing = [policy("deny-nothing", Action::Deny, vec![])];
        assert_eq!(judge(&deny_nothing, &from_web), Decision::Allowed);
    }

    #[test]
    fn rules_are_alternatives_clauses_all_hold_matches_are_alternatives() {
        let from_web = connection(Some(("web", "front")));
        let (yes, no) = (from_namespace("web"), from_namespace("bank"));
        for (rules, expected) in [
            (vec![vec![vec![no.clone()]], vec![vec![yes.clone()]]], true),
            (vec![vec![vec![yes.clone()], vec![to_port(8080)]]], true),
            (vec![vec![vec![yes.clone()], vec![to_port(9090)]]], false),
            (vec![vec![vec![no.clone(), yes.clone()]]], true),
            (vec![vec![vec![no.clone()], vec![yes.clone()]]], false),
            (vec![vec![vec![]]], true),
            (vec![vec![]], true),
            (vec![vec![vec![Match::default()]]], false),
        ] {
            let decision = judge(&[policy("p", Action::Allow, rules.clone())], &from_web);
            assert_eq!(decision == Decision::Allowed, expected, "{rules:?}");
        }
    }

    #[test]
    fn every_field_is_compared() {
        let account = |name: &str| ServiceAccount {
            namespace: "web".into(),
            name: name.into(),
        };
        let block = |text: &str, length| Block::new(text.parse().unwrap(), length).unwrap();
        let exact = |text: &str| StringMatch::Exact(text.into());
        let from_web = connection(Some(("web", "front")));
        let cases = [
            (
                Match {
                    principals: any(vec![exact("cluster.local/ns/web/sa/front")]),
                    ..Match::default()
                },
                true,
            ),
            (
                Match {
                    principals: any(vec![StringMatch::Prefix("cluster.local/ns/web/".into())]),
                    ..Match::default()
                },
                true,
            ),
            (
                Match {
                    principals: any(vec![StringMatch::Suffix("/sa/back".into())]),
                    ..Match::default()
                },
                false,
            ),
            (
                Match {
                    principals: none(vec![exact("cluster.local/ns/web/sa/front")]),
                    ..Match::default()
                },
                false,
            ),
            (
                Match {
                    namespaces: none(vec![exact("web")]),
                    ..Match::default()
                },
                false,
            ),
            (
                Match {
                    namespaces: none(vec![exact("bank")]),
                    ..Match::default()
                },
                true,
            ),
            (
                Match {
                    service_accounts: any(vec![account("front")]),
                    ..Match::default()
                },
                true,
            ),
            (
                Match {
                    service_accounts: any(vec![account("back")]),
                    ..Match::default()
                },
                false,
            ),
            (
                Match {
                    source_ips: any(vec![block("10.244.1.0", 24)]),
                    ..Match::default()
                },
                true,
            ),
            (
                Match {
                    source_ips: none(vec![block("10.244.1.5", 32)]),
                    ..Match::default()
                },
                false,
            ),
            (
                Match {
                    destination_ips: any(vec![block("10.244.1.0", 24)]),
                    ..Match::default()
                },
                false,
            ),
            (
                Match {
                    destination_ports: none(vec![8080]),
                    ..Match::default()
                },
                false,
            ),
            (
                Match {
                    destination_ports: any(vec![80, 8080]),
                    ..Match::default()
                },
                true,
            ),
        ];
        for (condition, expected) in cases {
            let decision = judge(
                &[policy("p", Action::Allow, one(condition.clone()))],
                &from_web,
            );
            assert_eq!(decision == Decision::Allowed, expected, "{condition:?}");
        }
    }

    #[test]
    fn who_has_no_identity_fits_every_not() {
        let not_bank = Match {
            namespaces: none(vec![StringMatch::Exact("bank".into())]),
            ..Match::default()
        };
        let policies = [policy("p", Action::Deny, one(not_bank))];
        assert!(matches!(
            judge(&policies, &connection(None)),
            Decision::DeniedBy(_)
        ));
    }

    #[test]
    fn dry_run_only_tells() {
        let mut quiet = (*strict()).clone();
        quiet.dry_run = true;
        let mut heard = vec![];
        let decision = decide(&[Arc::new(quiet)], &connection(None), |policy| {
            heard.push(policy.key());
        });
        assert_eq!(decision, Decision::Allowed);
        assert_eq!(heard, ["shop/istio_converted_static_strict"]);
    }

    #[test]
    fn blocks_of_every_length() {
        let block = |text: &str, length| Block::new(text.parse().unwrap(), length).unwrap();
        let ip = |text: &str| text.parse::<IpAddr>().unwrap();
        assert!(block("0.0.0.0", 0).contains(ip("203.0.113.9")));
        assert!(block("10.0.0.0", 8).contains(ip("10.255.0.1")));
        assert!(!block("10.0.0.0", 8).contains(ip("11.0.0.1")));
        assert!(block("10.0.0.0", 8).contains(ip("::ffff:10.0.0.1")));
        assert!(block("2001:db8::", 32).contains(ip("2001:db8::1")));
        assert!(!block("2001:db8::", 128).contains(ip("2001:db8::1")));
        assert!(!block("0.0.0.0", 0).contains(ip("2001:db8::1")));
        assert!(Block::new(ip("10.0.0.0"), 33).is_none());
    }
}
