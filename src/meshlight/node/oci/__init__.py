"""Images of the Open Container Initiative: named, found on disk or at a registry, unpacked, and read.

Rules: OCI image-spec 1.1 and distribution-spec 1.1; references as `docker` and `skopeo` write them.
"""
