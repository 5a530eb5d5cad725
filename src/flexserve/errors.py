"""One tree of exceptions. Each carries the same stable `code` in the API, the CLI and the log.

    FlexServeError            exit  http   family
    ├── Usage                    2   400   the call itself is wrong
    │   └── InvalidRequest       2   400   a request the engine cannot serve as asked
    ├── NotFound                 3   404   a file, model or server that is not there
    ├── NotAuthentic             4   422   bytes that are not what a trusted vendor signed
    ├── NotLicensed              5   403   authentic, but this device may not use it
    ├── KeyProblem               6   400   a key file that cannot be used
    ├── EngineFailure            7   500   compute failed, or the secure world did
    └── StorageFailure           8   500   the operating system refused a read or a write

A class's docstring is what its code means, in docs/errors.md too; the message says what happened to
which thing; `hint` says what to do about it.
"""

from __future__ import annotations

from typing import ClassVar


class FlexServeError(Exception):
    """Any other failure; the base of every error FlexServe raises on purpose."""

    code: ClassVar[str] = "error"
    http_status: ClassVar[int] = 500
    exit_code: ClassVar[int] = 1
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint

    def as_dict(self) -> dict[str, str]:
        """The form in API bodies, `--json` output and the channel."""
        return {"code": self.code, "message": self.message, "hint": self.hint}


class Usage(FlexServeError):
    """The call itself is wrong: an option, a value, or how they go together."""

    code = "usage"
    http_status = 400
    exit_code = 2


class InvalidRequest(Usage):
    """A field of the request is missing, of the wrong type or out of range."""

    code = "invalid_request"
    default_hint = "docs/api.md lists the fields and what each may be"


class ContextOverflow(InvalidRequest):
    """Prompt and answer do not fit the model's context."""

    code = "context_overflow"
    default_hint = "shorten the prompt, or lower max_tokens"


class TemplateFailure(InvalidRequest):
    """The model's chat template is missing, refused these messages, or exceeded its limits."""

    code = "template_failed"
    default_hint = "send a plain prompt instead (--raw, or /v1/completions)"


class RequestTooLarge(InvalidRequest):
    """The body of the request is larger than the server reads."""

    code = "request_too_large"
    http_status = 413
    default_hint = "shorten the prompt, or send several requests"


class RequestTooSlow(InvalidRequest):
    """The body of the request did not arrive in time."""

    code = "request_too_slow"
    http_status = 408
    default_hint = "send the whole body at once"


class MethodNotAllowed(InvalidRequest):
    """The endpoint exists, but not for this HTTP method."""

    code = "method_not_allowed"
    http_status = 405
    default_hint = "docs/api.md lists the endpoints"


class HostRefused(InvalidRequest):
    """The Host header names a host this server does not answer for (a defence against DNS rebinding)."""

    code = "host_refused"
    http_status = 403
    default_hint = "use an IP address or localhost, or start the server with --allow-host NAME"


class OriginRefused(InvalidRequest):
    """A web page of another site sent the request (its Origin header says so)."""

    code = "origin_refused"
    http_status = 403
    default_hint = "only pages of hosts this server answers for may use it, and programs that are no browser"


class ApiKeyWrong(InvalidRequest):
    """The server wants an API key, and the request has none or another one."""

    code = "api_key_wrong"
    http_status = 401
    default_hint = "send the header `Authorization: Bearer KEY`"


class AddressInUse(Usage):
    """Another program, or another FlexServe server, already listens there."""

    code = "address_in_use"
    default_hint = "stop the other one, or choose another --port or --admin-socket"


class NothingToRepack(Usage):
    """llama.cpp repacks nothing of the model on this processor (`flexserve optimize` says so and ends with 0)."""

    code = "nothing_to_repack"
    default_hint = "nothing to do: the sealed model is in execution layout already"


class NotFound(FlexServeError):
    """A file, an endpoint, a model or a server is not there."""

    code = "not_found"
    http_status = 404
    exit_code = 3
    default_hint = "check the name and the directory"


class ModelNotFound(NotFound):
    """No model of that name is registered."""

    code = "model_not_found"
    default_hint = "`flexserve list` names the models a running server has"


class ServerNotFound(NotFound):
    """No FlexServe server answers at the admin socket."""

    code = "server_not_found"
    default_hint = "start one with `flexserve serve`"


class NotAuthentic(FlexServeError):
    """The bytes are not what a trusted vendor signed."""

    code = "not_authentic"
    http_status = 422
    exit_code = 4


class SealedMalformed(NotAuthentic):
    """The file is not a sealed model, or a fixed field of it has an impossible value."""

    code = "sealed_malformed"
    default_hint = "get the file from its vendor again"


class SealedTruncated(SealedMalformed):
    """The file is shorter or longer than its signed manifest says."""

    code = "sealed_wrong_size"


class ManifestNotAuthentic(NotAuthentic):
    """The vendor's signature does not fit the manifest."""

    code = "manifest_not_authentic"
    default_hint = "the file was changed after sealing: get it from its vendor again"


class VendorNotTrusted(NotAuthentic):
    """The model is signed by a vendor this device does not trust."""

    code = "vendor_not_trusted"
    default_hint = (
        "trust the vendor with `flexserve keys trust vendor.pub`, or for one call with --vendor-pub"
    )


class SegmentNotAuthentic(NotAuthentic):
    """A segment failed authentication, or could not be read."""

    code = "segment_not_authentic"
    default_hint = (
        "the sealed file changed or its storage is failing: `flexserve verify` names every bad segment"
    )


class ModelMalformed(NotAuthentic):
    """The GGUF content is inconsistent or outside the limits, however well it is signed."""

    code = "model_malformed"
    default_hint = "the vendor sealed a broken model: ask for another version"


class DeviceCopyRefused(NotAuthentic):
    """A device's own copy of a model is damaged, or made for another device, model, licence, engine or processor."""

    code = "device_copy_refused"
    default_hint = "make it again with `flexserve optimize`; until then the sealed model itself is used"


class SessionRefused(NotAuthentic):
    """A saved session is damaged, or was saved by another device or with another model or engine."""

    code = "session_refused"
    default_hint = "nothing is lost but time: its tokens are computed again"


class NotLicensed(FlexServeError):
    """This device may not use this model."""

    code = "not_licensed"
    http_status = 403
    exit_code = 5
    default_hint = "ask the vendor for a licence for this device's public key"


class LicenceMalformed(NotLicensed):
    """The file is not a licence, or a fixed field of it has an impossible value."""

    code = "licence_malformed"


class LicenceNotAuthentic(NotLicensed):
    """The vendor's signature does not fit the licence, or the key inside does not open this model."""

    code = "licence_not_authentic"


class LicenceWrongDevice(NotLicensed):
    """The licence was written for another device."""

    code = "licence_wrong_device"


class LicenceWrongModel(NotLicensed):
    """The licence was written for another model or another sealing of it."""

    code = "licence_wrong_model"


class LicenceExpired(NotLicensed):
    """The licence's time is over."""

    code = "licence_expired"


class RolledBack(NotLicensed):
    """This device has already used a newer version of the model or a newer licence for it."""

    code = "rolled_back"
    default_hint = "use the newest model file and licence"


class KeyProblem(FlexServeError):
    """A key file is malformed or of the wrong kind."""

    code = "key_malformed"
    http_status = 400
    exit_code = 6
    default_hint = "give the right .key file; `flexserve keys` makes new ones"


class KeyPermissions(KeyProblem):
    """A secret key file can be read by others."""

    code = "key_permissions"
    default_hint = "chmod 600 the file; it must belong to the user who runs FlexServe"


class PassphraseWrong(KeyProblem):
    """The passphrase does not open the key, or is missing."""

    code = "passphrase_wrong"
    default_hint = "give the right passphrase; --passphrase-file reads it from a file"


class EngineFailure(FlexServeError):
    """Computing failed, or the secure world did."""

    code = "engine_failed"
    exit_code = 7


class EngineIncompatible(EngineFailure):
    """The installed llama.cpp is not the one FlexServe's memory code was written for."""

    code = "engine_incompatible"
    default_hint = "`make setup` installs the right one"


class ModelUnsupported(EngineFailure):
    """The model is authentic and well-formed, but llama.cpp cannot run it."""

    code = "model_unsupported"
    http_status = 422
    default_hint = "docs/coverage.md lists the models that work"


class WorldCrashed(EngineFailure):
    """The secure world ended while this request was in flight; it is started again."""

    code = "world_crashed"
    http_status = 503
    default_hint = "send the request again"


class ShuttingDown(EngineFailure):
    """The server was told to stop while this request was in flight."""

    code = "shutting_down"
    http_status = 503
    default_hint = "send the request again when the server is back"


class Busy(EngineFailure):
    """Too many requests are waiting."""

    code = "busy"
    http_status = 503
    default_hint = "send the request again later"


class OutOfBudget(EngineFailure):
    """The memory budget does not hold the request's keys and values, and no more memory was offered in time."""

    code = "out_of_budget"
    http_status = 503
    default_hint = "raise the budget (`flexserve budget`), close other programs, or shorten the prompt"


class StorageFailure(FlexServeError):
    """The operating system refused to read or write."""

    code = "storage_failed"
    exit_code = 8
    default_hint = "check that the path exists, who may read and write it, and the free space"


class StateNotAuthentic(StorageFailure):
    """The device's state file (highest serial, version, time) was not written with this device's key."""

    code = "state_not_authentic"
    default_hint = (
        "if the key was replaced on purpose, delete this device's .state file in $XDG_STATE_HOME/flexserve "
        "(~/.local/state/flexserve): which versions and licences it has used is forgotten then"
    )


def by_code(code: str) -> type[FlexServeError]:
    """The class with that `code` (errors cross the channel by code); FlexServeError when unknown."""
    pending: list[type[FlexServeError]] = [FlexServeError]
    while pending:
        cls = pending.pop()
        if cls.code == code:
            return cls
        pending.extend(cls.__subclasses__())
    return FlexServeError
