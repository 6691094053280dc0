"""IPv6 on a whole cluster: Services of both families, names, LoadBalancer addresses, and the mesh."""

from __future__ import annotations

from clusters import Cluster, pod, service, wait_until


def test_services_of_both_families_in_and_out_of_the_mesh(cluster: Cluster, namespace: str) -> None:
    nodes = [f"{cluster.name}-node-{n}" for n in (1, 2)]
    server = pod("server", namespace, ["python3", "-m", "http.server", "--bind", "::", "80"], nodeName=nodes[0])
    server["spec"]["containers"][0]["readinessProbe"] = {"tcpSocket": {"port": 80}, "periodSeconds": 1}
    both = service("server", namespace, 80)
    both["spec"] |= {"type": "LoadBalancer", "ipFamilyPolicy": "RequireDualStack"}
    headless = service("headless", namespace, 80)
    headless["spec"] |= {"clusterIP": "None", "ipFamilies": ["IPv6"], "selector": {"app": "server"}}
    cluster.apply(server, both, headless, pod("client", namespace, ["sleep", "600"], nodeName=nodes[1]))
    cluster.kubectl("wait", "-n", namespace, "--for=condition=Ready", "pod", "--all", "--timeout=60s")
    ips = [entry["ip"] for entry in cluster.get("pod", "server", "-n", namespace)["status"]["podIPs"]]
    assert len(ips) == 2 and ips[1].startswith("fd6d:6c10:244:1::")
    made = wait_until(
        lambda: (
            (s := cluster.get("service", "server", "-n", namespace))["status"]["loadBalancer"].get("ingress")
            and s
        ),
        what="LoadBalancer addresses",
    )
    vip, outer = made["spec"]["clusterIPs"][1], made["status"]["loadBalancer"]["ingress"][1]["ip"]

    def fetched(*arguments: str) -> str:
        written = ("-o", "/dev/null", "-w", "%{http_code} %{remote_ip}", "--max-time", "5")
        return cluster.kubectl(
            "exec", "-n", namespace, "client", "--", "curl", "-sS", *written, *arguments, check=False
        ).strip()

    def all_ways() -> None:
        for arguments, address in (
            ((f"http://[{vip}]/",), vip),
            ((f"http://[{outer}]/",), outer),
            (("-6", "http://server/"), vip),
            (("-4", "http://server/"), made["spec"]["clusterIP"]),
            (("http://headless/",), ips[1]),
        ):
            wait_until(lambda a=arguments, ip=address: fetched(*a) == f"200 {ip}", what=f"{arguments}")

    all_ways()
    cluster.kubectl("label", "namespace", namespace, "istio.io/dataplane-mode=ambient")
    for name in ("server", "client"):
        wait_until(
            lambda name=name: (
                cluster.get("pod", name, "-n", namespace)["metadata"].get("annotations") or {}
            ).get("ambient.istio.io/redirection"),
            what="enrolment",
        )
    all_ways()

    def in_the_mesh() -> bool:
        logs = cluster.kubectl("logs", "-n", "istio-system", "-l", "app=ztunnel", "--tail=100")
        return any(
            f'"dst.hbone_addr":"[{ips[1]}]:80"' in line and "inbound" in line for line in logs.splitlines()
        )

    wait_until(in_the_mesh, what="IPv6 inside HBONE")
