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
    let judgement = super::judge(policies, connection);
    assert_eq!(judgement.dry_run, None);
    judgement.decision
}

fn keys(decision: &Decision) -> Vec<String> {
    decision
        .policies()
        .iter()
        .map(|policy| policy.key())
        .collect()
}

#[test]
fn without_policies_everything_passes() {
    assert_eq!(judge(&[], &connection(None)), Decision::Allowed(None));
}

#[test]
fn strict_refuses_only_those_without_identity() {
    let strict = [strict()];
    assert_eq!(
        judge(&strict, &connection(None)).to_string(),
        "explicitly denied by: shop/istio_converted_static_strict"
    );
    assert!(judge(&strict, &connection(Some(("a", "b")))).allows());
}

#[test]
fn deny_wins_over_allow() {
    let policies = [
        policy("yes", Action::Allow, one(from_namespace("web"))),
        policy("no", Action::Deny, one(to_port(8080))),
    ];
    let from_web = connection(Some(("web", "front")));
    let decision = judge(&policies, &from_web);
    assert!(matches!(decision, Decision::DeniedBy(_)));
    assert_eq!(keys(&decision), ["shop/no"]);
}

#[test]
fn with_an_allow_policy_the_others_are_refused() {
    let policies = [policy("yes", Action::Allow, one(from_namespace("web")))];
    let allowed = judge(&policies, &connection(Some(("web", "front"))));
    assert_eq!(allowed, Decision::Allowed(Some(policies[0].clone())));
    for other in [connection(Some(("bank", "x"))), connection(None)] {
        assert_eq!(
            judge(&policies, &other).to_string(),
            "allow policies exist, but none allowed: shop/yes"
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
    assert!(judge(&deny_nothing, &from_web).allows());
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
        assert_eq!(decision.allows(), expected, "{rules:?}");
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
        assert_eq!(decision.allows(), expected, "{condition:?}");
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
    let dry = |policy: Arc<Policy>| {
        Arc::new(Policy {
            dry_run: true,
            ..(*policy).clone()
        })
    };
    let plain = connection(None);
    let judgement = super::judge(&[dry(strict())], &plain);
    assert_eq!(judgement.decision, Decision::Allowed(None));
    assert_eq!(
        judgement.dry_run.as_ref().map(keys),
        Some(vec!["shop/istio_converted_static_strict".to_owned()])
    );

    let allow_web = policy("yes", Action::Allow, one(from_namespace("web")));
    let judgement = super::judge(&[dry(allow_web.clone())], &plain);
    assert!(judgement.decision.allows());
    assert!(matches!(judgement.dry_run, Some(Decision::NotAllowedBy(_))));
    // What is refused anyway would have been refused.
    let judgement = super::judge(&[allow_web, dry(strict())], &plain);
    assert!(!judgement.decision.allows());
    assert_eq!(judgement.dry_run, None);
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
