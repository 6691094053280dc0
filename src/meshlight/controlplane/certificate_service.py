"""IstioCertificateService: from a bearer token and a certificate request to a signed certificate.

Authentication, authorization and signing in that order, each with its own gRPC status. Transport is
the caller's: this module sees an authorization header and a request message.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass

from grpclib import GRPCError, Status

from meshlight.controlplane.authority import Authority, AuthorityError, BadRequest, Lifetimes
from meshlight.controlplane.identity import (
    Caller,
    Identity,
    ReviewUnavailable,
    TokenReviewer,
    Unauthenticated,
    bearer_token,
)
from meshlight.controlplane.logs import Scope
from meshlight.controlplane.metrics import Metrics
from meshlight.controlplane.node_authorization import Forbidden, NodeAuthorizer
from meshlight.proto import ca_pb2

IMPERSONATED_IDENTITY = "ImpersonatedIdentity"

log = Scope("serverca")


@dataclass(slots=True)
class CertificateService:
    """Signs workload certificates with one authority."""

    authority: Authority
    lifetimes: Lifetimes
    trust_domain: str
    reviewer: TokenReviewer
    nodes: NodeAuthorizer
    metrics: Metrics
    now: Callable[[], datetime.datetime]
    granted: Callable[[datetime.timedelta], None] = lambda life: None

    async def authenticate(self, authorization: str | None) -> Caller:
        """The caller behind an authorization header; raises GRPCError."""
        self.metrics.csr_count.inc()
        return await authenticate(self.reviewer, authorization, self.metrics)

    def sign(self, caller: Caller, request: ca_pb2.IstioCertificateRequest) -> ca_pb2.IstioCertificateResponse:
        """Sign for an authenticated caller; raises GRPCError saying what is wrong."""
        begun = time.perf_counter()
        identity = self._identity(caller, request)
        try:
            leaf = self.authority.sign_workload(
                request.csr,
                str(identity),
                datetime.timedelta(seconds=min(max(request.validity_duration, 0), _CENTURY)),
                self.lifetimes,
                self.now(),
            )
        except BadRequest as error:
            self.metrics.csr_parsing_errors.inc()
            log.warn("certificate request rejected", caller=caller.service_account, error=str(error))
            raise GRPCError(Status.INVALID_ARGUMENT, str(error)) from error
        except AuthorityError as error:
            self.metrics.csr_sign_errors.inc()
            log.error("certificate not signed", identity=identity, error=str(error))
            raise GRPCError(Status.INTERNAL, str(error)) from error
        self.metrics.certificates_issued.inc()
        self.metrics.issuance.observe(time.perf_counter() - begun)
        self.granted(leaf.not_valid_after_utc - self.now())
        # The audit trail: who got which identity, for how long. Never a key, a token or a request.
        log.info(
            "certificate issued",
            identity=identity,
            serial=f"{leaf.serial_number:x}",
            expires=leaf.not_valid_after_utc,
            caller=caller.service_account,
            pod=caller.pod_name,
            node=caller.node_name,
        )
        return ca_pb2.IstioCertificateResponse(cert_chain=self.authority.chain(leaf))

    def _identity(self, caller: Caller, request: ca_pb2.IstioCertificateRequest) -> Identity:
        """The identity to certify: the caller's own, or the one it asks for on behalf of a pod."""
        wanted = request.metadata.fields[IMPERSONATED_IDENTITY].string_value
        try:
            self.nodes.check_account(caller.service_account)
        except Forbidden as error:
            self.metrics.authentication_failures.inc()
            log.warn("certificate refused", caller=caller.service_account, error=str(error))
            raise GRPCError(Status.PERMISSION_DENIED, str(error)) from error
        if not wanted:
            return Identity(self.trust_domain, caller.service_account)
        try:
            identity = Identity.parse(wanted)
        except ValueError as error:
            self.metrics.csr_parsing_errors.inc()
            raise GRPCError(Status.INVALID_ARGUMENT, f"metadata.{IMPERSONATED_IDENTITY}: {error}") from error
        try:
            self.nodes.authorize(caller, identity)
        except Forbidden as error:
            self.metrics.authentication_failures.inc()
            log.warn(
                "impersonation refused", identity=identity, caller=caller.service_account, error=str(error)
            )
            raise GRPCError(Status.PERMISSION_DENIED, f"{identity}: {error}") from error
        return identity


_CENTURY = 100 * 365 * 86400


async def authenticate(reviewer: TokenReviewer, authorization: str | None, metrics: Metrics) -> Caller:
    """The caller behind an authorization header.

    Raises GRPCError: UNAUTHENTICATED, or UNAVAILABLE when the token could not be reviewed.
    """
    try:
        return await reviewer.review(bearer_token(authorization))
    except Unauthenticated as error:
        metrics.authentication_failures.inc()
        log.warn("caller not authenticated", error=str(error))
        raise GRPCError(Status.UNAUTHENTICATED, str(error)) from error
    except ReviewUnavailable as error:
        log.warn("token not reviewed", error=str(error))
        raise GRPCError(Status.UNAVAILABLE, str(error)) from error
