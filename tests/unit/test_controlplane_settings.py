"""istiod's configuration: Istio's environment and command line."""

from __future__ import annotations

from datetime import timedelta

import pytest

from meshlight.controlplane.command_line import from_arguments, parser
from meshlight.controlplane.settings import ServiceAccount, Settings, SettingsError, parse_duration


def test_defaults() -> None:
    settings = Settings.from_environment({})
    assert settings == Settings()
    assert settings.mesh.hostname("web", "shop") == "web.shop.svc.cluster.local"


def test_istios_variables() -> None:
    settings = Settings.from_environment(
        {
            "POD_NAMESPACE": "mesh",
            "TRUST_DOMAIN": "example.org",
            "CLUSTER_ID": "c1",
            "MAX_WORKLOAD_CERT_TTL": "48h0m0s",
            "DEFAULT_WORKLOAD_CERT_TTL": "90m",
            "CA_TRUSTED_NODE_ACCOUNTS": "mesh/ztunnel, kube-system/ztunnel",
            "XDS_AUTH_PLAINTEXT": "false",
        }
    )
    assert (settings.mesh.root_namespace, settings.mesh.trust_domain) == ("mesh", "example.org")
    assert settings.maximum_certificate_lifetime == timedelta(hours=48)
    assert settings.default_certificate_lifetime == timedelta(minutes=90)
    assert settings.trusted_node_accounts == {
        ServiceAccount("mesh", "ztunnel"),
        ServiceAccount("kube-system", "ztunnel"),
    }
    assert not settings.plaintext_needs_token


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MAX_WORKLOAD_CERT_TTL", "2 days"),
        ("MAX_WORKLOAD_CERT_TTL", "0s"),
        ("CA_TRUSTED_NODE_ACCOUNTS", "ztunnel"),
        ("XDS_AUTH_PLAINTEXT", "maybe"),
        ("GRPC_PORT", "70000"),
        ("LOG_LEVEL", "loud"),
    ],
)
def test_bad_values_are_named(name: str, value: str) -> None:
    with pytest.raises(SettingsError, match=name):
        Settings.from_environment({name: value})


@pytest.mark.parametrize(("text", "seconds"), [("24h0m0s", 86400), ("10ms", 0.01), ("1.5h", 5400)])
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text).total_seconds() == seconds


def test_the_command_line_of_istios_deployment() -> None:
    words = "discovery --monitoringAddr=:16014 --log_output_level=default:debug,ads:info --domain example.org"
    arguments, unknown = parser().parse_known_args([*words.split(), "--keepaliveMaxServerConnectionAge", "30m"])
    settings = from_arguments(Settings(), arguments)
    assert (settings.monitoring_port, settings.grpc_port) == (16014, 15010)
    assert settings.log_level == "debug"
    assert settings.mesh.cluster_domain == "example.org"
    assert unknown == ["--keepaliveMaxServerConnectionAge", "30m"]


@pytest.mark.parametrize("flag", ["--grpcAddr=:x", "--httpAddr=:0", "--log_output_level=default:loud"])
def test_bad_flags_are_named(flag: str) -> None:
    arguments, _ = parser().parse_known_args([flag])
    with pytest.raises(SettingsError, match=flag.partition("=")[0]):
        from_arguments(Settings(), arguments)
