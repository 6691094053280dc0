"""`istioctl analyze`: messages about configuration that is stored, or about to be.

`messages` are Istio's codes, `manifests` reads files, `engine` runs the analyzers of the other modules. Pure
but for reading files; nothing here changes anything.
"""
