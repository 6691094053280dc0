"""The way between the cluster's namespaces and the machine's own network, without changing the latter.

Sockets keep the network namespace in which they were opened. A small process on the machine's side, the
**outlet**, opens sockets there and hands them in over a unix socket; the **uplink**, in the fabric's
namespace, carries the traffic. Imports only go down: here to `node.netns` and `kube`.
"""
