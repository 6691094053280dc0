"""Compilers: objects of the mesh in, Envoy's resources out. Pure; `index` puts them together.

`clusters` and `endpoints` say where requests can go, `routes` which request goes where, `http` and
`listeners` how connections are taken, `bootstrap` how a proxy begins. Nothing here does I/O.
"""
