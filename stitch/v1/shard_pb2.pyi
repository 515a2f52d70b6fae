from stitch.v1 import inference_pb2 as _inference_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Dtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DTYPE_UNSPECIFIED: _ClassVar[Dtype]
    DTYPE_FLOAT32: _ClassVar[Dtype]
    DTYPE_BFLOAT16: _ClassVar[Dtype]
    DTYPE_FLOAT16: _ClassVar[Dtype]
    DTYPE_INT8: _ClassVar[Dtype]

class FailureCause(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FAILURE_CAUSE_UNSPECIFIED: _ClassVar[FailureCause]
    FAILURE_CAUSE_KV_EXHAUSTED: _ClassVar[FailureCause]
    FAILURE_CAUSE_PREFIX_MISSING: _ClassVar[FailureCause]
    FAILURE_CAUSE_UNAVAILABLE: _ClassVar[FailureCause]
    FAILURE_CAUSE_PRECONDITION: _ClassVar[FailureCause]
    FAILURE_CAUSE_TOO_LONG: _ClassVar[FailureCause]
    FAILURE_CAUSE_DRAINING: _ClassVar[FailureCause]
    FAILURE_CAUSE_NOT_COMPILED: _ClassVar[FailureCause]
DTYPE_UNSPECIFIED: Dtype
DTYPE_FLOAT32: Dtype
DTYPE_BFLOAT16: Dtype
DTYPE_FLOAT16: Dtype
DTYPE_INT8: Dtype
FAILURE_CAUSE_UNSPECIFIED: FailureCause
FAILURE_CAUSE_KV_EXHAUSTED: FailureCause
FAILURE_CAUSE_PREFIX_MISSING: FailureCause
FAILURE_CAUSE_UNAVAILABLE: FailureCause
FAILURE_CAUSE_PRECONDITION: FailureCause
FAILURE_CAUSE_TOO_LONG: FailureCause
FAILURE_CAUSE_DRAINING: FailureCause
FAILURE_CAUSE_NOT_COMPILED: FailureCause

class ShardGenerateRequest(_message.Message):
    __slots__ = ("request_id", "token_ids", "prompt_tokens", "route", "chain", "sampling", "candidates", "tenant", "tenant_weight", "grammar", "traceparent")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    TENANT_WEIGHT_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_tokens: int
    route: str
    chain: _containers.RepeatedScalarFieldContainer[str]
    sampling: _inference_pb2.Sampling
    candidates: _containers.RepeatedCompositeFieldContainer[CandidateChain]
    tenant: str
    tenant_weight: float
    grammar: Grammar
    traceparent: str
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., prompt_tokens: _Optional[int] = ..., route: _Optional[str] = ..., chain: _Optional[_Iterable[str]] = ..., sampling: _Optional[_Union[_inference_pb2.Sampling, _Mapping]] = ..., candidates: _Optional[_Iterable[_Union[CandidateChain, _Mapping]]] = ..., tenant: _Optional[str] = ..., tenant_weight: _Optional[float] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ..., traceparent: _Optional[str] = ...) -> None: ...

class Grammar(_message.Message):
    __slots__ = ("json_schema", "regex", "lark")
    JSON_SCHEMA_FIELD_NUMBER: _ClassVar[int]
    REGEX_FIELD_NUMBER: _ClassVar[int]
    LARK_FIELD_NUMBER: _ClassVar[int]
    json_schema: str
    regex: str
    lark: str
    def __init__(self, json_schema: _Optional[str] = ..., regex: _Optional[str] = ..., lark: _Optional[str] = ...) -> None: ...

class CandidateChain(_message.Message):
    __slots__ = ("route", "chain")
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    route: str
    chain: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, route: _Optional[str] = ..., chain: _Optional[_Iterable[str]] = ...) -> None: ...

class ShardGenerateResponse(_message.Message):
    __slots__ = ("tokens", "finish_reason", "stages", "decision", "cached_tokens")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: _containers.RepeatedCompositeFieldContainer[GeneratedToken]
    finish_reason: _inference_pb2.FinishReason
    stages: _containers.RepeatedCompositeFieldContainer[_inference_pb2.Stage]
    decision: ProbeDecision
    cached_tokens: int
    def __init__(self, tokens: _Optional[_Iterable[_Union[GeneratedToken, _Mapping]]] = ..., finish_reason: _Optional[_Union[_inference_pb2.FinishReason, str]] = ..., stages: _Optional[_Iterable[_Union[_inference_pb2.Stage, _Mapping]]] = ..., decision: _Optional[_Union[ProbeDecision, _Mapping]] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class ProbeDecision(_message.Message):
    __slots__ = ("route", "score", "gains", "thresholds", "failure", "preferred")
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    GAINS_FIELD_NUMBER: _ClassVar[int]
    THRESHOLDS_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    PREFERRED_FIELD_NUMBER: _ClassVar[int]
    route: str
    score: float
    gains: _containers.RepeatedScalarFieldContainer[float]
    thresholds: _containers.RepeatedScalarFieldContainer[float]
    failure: str
    preferred: str
    def __init__(self, route: _Optional[str] = ..., score: _Optional[float] = ..., gains: _Optional[_Iterable[float]] = ..., thresholds: _Optional[_Iterable[float]] = ..., failure: _Optional[str] = ..., preferred: _Optional[str] = ...) -> None: ...

class GeneratedToken(_message.Message):
    __slots__ = ("id", "position", "logprobs")
    ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    id: int
    position: int
    logprobs: _inference_pb2.TokenLogprobs
    def __init__(self, id: _Optional[int] = ..., position: _Optional[int] = ..., logprobs: _Optional[_Union[_inference_pb2.TokenLogprobs, _Mapping]] = ...) -> None: ...

class LinkRequest(_message.Message):
    __slots__ = ("hello", "step", "close", "want", "heartbeat")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    WANT_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    step: Step
    close: CloseSessions
    want: KvWanted
    heartbeat: Heartbeat
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., close: _Optional[_Union[CloseSessions, _Mapping]] = ..., want: _Optional[_Union[KvWanted, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class LinkResponse(_message.Message):
    __slots__ = ("welcome", "reply", "heartbeat", "room")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    ROOM_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    reply: StepReply
    heartbeat: Heartbeat
    room: KvRoom
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., reply: _Optional[_Union[StepReply, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., room: _Optional[_Union[KvRoom, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("protocol_version", "identity", "caller")
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    CALLER_FIELD_NUMBER: _ClassVar[int]
    protocol_version: int
    identity: ShardIdentity
    caller: str
    def __init__(self, protocol_version: _Optional[int] = ..., identity: _Optional[_Union[ShardIdentity, _Mapping]] = ..., caller: _Optional[str] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("identity",)
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    identity: ShardIdentity
    def __init__(self, identity: _Optional[_Union[ShardIdentity, _Mapping]] = ...) -> None: ...

class ShardIdentity(_message.Message):
    __slots__ = ("shard", "role", "first_layer", "end_layer", "bottom", "top", "tokenizer", "wire_dtype", "routes", "kv_capacity_tokens", "kv_block_tokens", "device", "compute_dtype", "probe", "quantization")
    SHARD_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    FIRST_LAYER_FIELD_NUMBER: _ClassVar[int]
    END_LAYER_FIELD_NUMBER: _ClassVar[int]
    BOTTOM_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    WIRE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    ROUTES_FIELD_NUMBER: _ClassVar[int]
    KV_CAPACITY_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_DTYPE_FIELD_NUMBER: _ClassVar[int]
    PROBE_FIELD_NUMBER: _ClassVar[int]
    QUANTIZATION_FIELD_NUMBER: _ClassVar[int]
    shard: str
    role: str
    first_layer: int
    end_layer: int
    bottom: _inference_pb2.Model
    top: _inference_pb2.Model
    tokenizer: str
    wire_dtype: Dtype
    routes: _containers.RepeatedCompositeFieldContainer[_inference_pb2.RouteDescription]
    kv_capacity_tokens: int
    kv_block_tokens: int
    device: str
    compute_dtype: str
    probe: str
    quantization: str
    def __init__(self, shard: _Optional[str] = ..., role: _Optional[str] = ..., first_layer: _Optional[int] = ..., end_layer: _Optional[int] = ..., bottom: _Optional[_Union[_inference_pb2.Model, _Mapping]] = ..., top: _Optional[_Union[_inference_pb2.Model, _Mapping]] = ..., tokenizer: _Optional[str] = ..., wire_dtype: _Optional[_Union[Dtype, str]] = ..., routes: _Optional[_Iterable[_Union[_inference_pb2.RouteDescription, _Mapping]]] = ..., kv_capacity_tokens: _Optional[int] = ..., kv_block_tokens: _Optional[int] = ..., device: _Optional[str] = ..., compute_dtype: _Optional[str] = ..., probe: _Optional[str] = ..., quantization: _Optional[str] = ...) -> None: ...

class HiddenStates(_message.Message):
    __slots__ = ("dtype", "tokens", "hidden_size", "data", "scales")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    dtype: Dtype
    tokens: int
    hidden_size: int
    data: bytes
    scales: bytes
    def __init__(self, dtype: _Optional[_Union[Dtype, str]] = ..., tokens: _Optional[int] = ..., hidden_size: _Optional[int] = ..., data: _Optional[bytes] = ..., scales: _Optional[bytes] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("step", "segments", "hidden", "tokens_to_come", "pipelined")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SEGMENTS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_FIELD_NUMBER: _ClassVar[int]
    TOKENS_TO_COME_FIELD_NUMBER: _ClassVar[int]
    PIPELINED_FIELD_NUMBER: _ClassVar[int]
    step: int
    segments: _containers.RepeatedCompositeFieldContainer[Segment]
    hidden: HiddenStates
    tokens_to_come: int
    pipelined: bool
    def __init__(self, step: _Optional[int] = ..., segments: _Optional[_Iterable[_Union[Segment, _Mapping]]] = ..., hidden: _Optional[_Union[HiddenStates, _Mapping]] = ..., tokens_to_come: _Optional[int] = ..., pipelined: _Optional[bool] = ...) -> None: ...

class Segment(_message.Message):
    __slots__ = ("session", "epoch", "position", "length", "wants_token", "new_session")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    LENGTH_FIELD_NUMBER: _ClassVar[int]
    WANTS_TOKEN_FIELD_NUMBER: _ClassVar[int]
    NEW_SESSION_FIELD_NUMBER: _ClassVar[int]
    session: int
    epoch: int
    position: int
    length: int
    wants_token: bool
    new_session: NewSession
    def __init__(self, session: _Optional[int] = ..., epoch: _Optional[int] = ..., position: _Optional[int] = ..., length: _Optional[int] = ..., wants_token: _Optional[bool] = ..., new_session: _Optional[_Union[NewSession, _Mapping]] = ...) -> None: ...

class NewSession(_message.Message):
    __slots__ = ("route", "chain", "sampling", "token_ids", "prompt_tokens", "reused_tokens", "tenant", "expected_tokens", "grammar", "traceparent")
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REUSED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    GRAMMAR_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    route: str
    chain: _containers.RepeatedScalarFieldContainer[str]
    sampling: _inference_pb2.Sampling
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    prompt_tokens: int
    reused_tokens: int
    tenant: str
    expected_tokens: int
    grammar: Grammar
    traceparent: str
    def __init__(self, route: _Optional[str] = ..., chain: _Optional[_Iterable[str]] = ..., sampling: _Optional[_Union[_inference_pb2.Sampling, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., prompt_tokens: _Optional[int] = ..., reused_tokens: _Optional[int] = ..., tenant: _Optional[str] = ..., expected_tokens: _Optional[int] = ..., grammar: _Optional[_Union[Grammar, _Mapping]] = ..., traceparent: _Optional[str] = ...) -> None: ...

class StepReply(_message.Message):
    __slots__ = ("step", "tokens", "failures", "stages", "kv_free_tokens")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    FAILURES_FIELD_NUMBER: _ClassVar[int]
    STAGES_FIELD_NUMBER: _ClassVar[int]
    KV_FREE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    step: int
    tokens: _containers.RepeatedCompositeFieldContainer[StepToken]
    failures: _containers.RepeatedCompositeFieldContainer[SessionFailure]
    stages: _containers.RepeatedCompositeFieldContainer[_inference_pb2.Stage]
    kv_free_tokens: int
    def __init__(self, step: _Optional[int] = ..., tokens: _Optional[_Iterable[_Union[StepToken, _Mapping]]] = ..., failures: _Optional[_Iterable[_Union[SessionFailure, _Mapping]]] = ..., stages: _Optional[_Iterable[_Union[_inference_pb2.Stage, _Mapping]]] = ..., kv_free_tokens: _Optional[int] = ...) -> None: ...

class StepToken(_message.Message):
    __slots__ = ("session", "epoch", "token")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    TOKEN_FIELD_NUMBER: _ClassVar[int]
    session: int
    epoch: int
    token: GeneratedToken
    def __init__(self, session: _Optional[int] = ..., epoch: _Optional[int] = ..., token: _Optional[_Union[GeneratedToken, _Mapping]] = ...) -> None: ...

class SessionFailure(_message.Message):
    __slots__ = ("session", "epoch", "cause", "message", "shard")
    SESSION_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    CAUSE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    session: int
    epoch: int
    cause: FailureCause
    message: str
    shard: str
    def __init__(self, session: _Optional[int] = ..., epoch: _Optional[int] = ..., cause: _Optional[_Union[FailureCause, str]] = ..., message: _Optional[str] = ..., shard: _Optional[str] = ...) -> None: ...

class CloseSessions(_message.Message):
    __slots__ = ("sessions",)
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    sessions: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, sessions: _Optional[_Iterable[int]] = ...) -> None: ...

class KvWanted(_message.Message):
    __slots__ = ("tokens", "chain")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    CHAIN_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    chain: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, tokens: _Optional[int] = ..., chain: _Optional[_Iterable[str]] = ...) -> None: ...

class KvRoom(_message.Message):
    __slots__ = ("tokens",)
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tokens: int
    def __init__(self, tokens: _Optional[int] = ...) -> None: ...

class ShardDescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShardDescribeResponse(_message.Message):
    __slots__ = ("identity", "kv_free_tokens", "running_sessions", "waiting_sessions", "draining", "suspects")
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    KV_FREE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    WAITING_SESSIONS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    SUSPECTS_FIELD_NUMBER: _ClassVar[int]
    identity: ShardIdentity
    kv_free_tokens: int
    running_sessions: int
    waiting_sessions: int
    draining: bool
    suspects: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, identity: _Optional[_Union[ShardIdentity, _Mapping]] = ..., kv_free_tokens: _Optional[int] = ..., running_sessions: _Optional[int] = ..., waiting_sessions: _Optional[int] = ..., draining: _Optional[bool] = ..., suspects: _Optional[_Iterable[str]] = ...) -> None: ...

class FetchTokenizerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class FetchTokenizerResponse(_message.Message):
    __slots__ = ("file", "data")
    FILE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    file: str
    data: bytes
    def __init__(self, file: _Optional[str] = ..., data: _Optional[bytes] = ...) -> None: ...
