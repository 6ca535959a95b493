"""What clients may ask, as models of JSON: types are strict, every number has bounds, every list a length."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from inference.sampling import SamplingParams

MAX_TEXT = 1 << 20  # characters; the body's limit is met first
MAX_PREFIX_CHARACTERS = 32_768
MAX_NEW_TOKENS = 1 << 20  # the service's own limit, max_tokens, is met first
MAX_STOP_STRINGS = 16
MAX_LISTED_TOKENS = 1024
MAX_MESSAGES = 1024
MAX_CHOICES = 16
MAX_PROMPTS = 64
MAX_TOOLS = 128
MAX_ECHOED_LOGPROBS = 5  # alternatives of each token of a prompt, of which a body may have a hundred thousand
MAX_FORM = 65_536  # characters of an expression or a grammar
ALL_TOKENS_BIAS = 100.0


def _biases(value: Any) -> Any:
    """`{"15": -100}` → `{15: -100.0}`; the first mistake ends it, as there may be a hundred thousand."""
    if not isinstance(value, dict):
        raise ValueError("must be an object of token ids and numbers")
    if len(value) > MAX_LISTED_TOKENS:
        raise ValueError(f"has {len(value)} entries; at most {MAX_LISTED_TOKENS} are allowed")
    for token, bias in value.items():
        if isinstance(token, str) and not (token.isascii() and token.isdecimal() and len(token) <= 10):
            raise ValueError(f"{token[:40]!r} is no token id")
        if isinstance(bias, bool) or not isinstance(bias, (int, float)) or not abs(bias) <= ALL_TOKENS_BIAS:
            raise ValueError(f"the bias of {str(token)[:40]} must be a number from -100 to 100")
    return {int(token): float(bias) for token, bias in value.items()}


def _listed(value: Any) -> Any:
    """One string is a list of one."""
    return [value] if isinstance(value, str) else value


TokenId = Annotated[int, Field(ge=0, le=2**31)]
TokenIds = Annotated[list[TokenId], Field(max_length=MAX_LISTED_TOKENS, fail_fast=True)]
StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=256)]],
    Field(max_length=MAX_STOP_STRINGS, fail_fast=True),
    BeforeValidator(_listed, json_schema_input_type=str | list[str]),
]
Biases = Annotated[dict[int, float], BeforeValidator(_biases, json_schema_input_type=dict[str, float])]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
FormText = Annotated[str, Field(min_length=1, max_length=MAX_FORM)]
Text = Annotated[str, Field(max_length=MAX_TEXT)]


class Body(BaseModel):
    """A request's body. A misspelt field is an error instead of being ignored; null means absent."""

    model_config = ConfigDict(strict=True, extra="forbid")
    shown: ClassVar[dict[str, Any]] = {}  # an example of it

    @classmethod
    def example(cls) -> str:
        """A small request of this kind."""
        return json.dumps(cls.shown, ensure_ascii=False)


class Sampling(Body):
    """The settings that all requests for text share."""

    seed: int | None = Field(None, ge=-(2**63), lt=2**63, description="Makes sampling repeatable.")
    top_p: float = Field(1.0, gt=0, le=1, description="Sample from the likeliest tokens that have this probability.")
    min_p: float = Field(0.0, ge=0, le=1, description="Drop tokens less likely than this share of the likeliest one.")
    repetition_penalty: float = Field(
        1.0, ge=0.1, le=10, description="Above 1, tokens of the prompt and the answer become less likely."
    )
    presence_penalty: Penalty = Field(0.0, description="Subtracted from the logit of a token that the answer has.")
    frequency_penalty: Penalty = Field(0.0, description="Subtracted for each time that the answer has the token.")
    logit_bias: Biases = Field({}, description="Token id → what is added to its logit, from -100 to 100.")
    stop: StopStrings = Field([], description="One or several strings that end the answer and are not part of it.")
    stop_token_ids: TokenIds = Field([], description="Ids that end the answer.")
    banned_tokens: TokenIds = Field([], description="Ids that are never produced.")
    ignore_eos: bool = Field(False, description="Go on after the token that ends an answer.")
    overflow: Literal["error", "slide"] = Field(
        "error", description="`slide` goes on beyond the model's context, forgetting the oldest tokens."
    )
    stream: bool = Field(False, description="Send the text as it is written, as server-sent events.")

    def sampling(self, recommended: Mapping[str, float], **more: Any) -> SamplingParams:
        """These fields as the engine takes them, and `more`; what the request leaves out is as `recommended`."""
        shared = {name: getattr(self, name) for name in Sampling.model_fields if name != "stream"}
        shared = {name: tuple(value) if isinstance(value, list) else value for name, value in shared.items()}
        unsaid = {name: value for name, value in recommended.items() if name not in self.model_fields_set}
        return SamplingParams(**{**shared, **more, **unsaid})


class GenerateRequest(Sampling):
    """What to generate."""

    shown = {"prefix": "解释什么是机器学习", "max_gen_len": 100, "top_k": 50, "temperature": 0.8}

    prefix: str = Field(
        min_length=1,
        max_length=MAX_PREFIX_CHARACTERS,
        description="The question, or for a model that was only pretrained the text to continue.",
        examples=["解释什么是机器学习"],
    )
    max_gen_len: int = Field(100, ge=1, le=MAX_NEW_TOKENS, description="At most this many new tokens.")
    top_k: int = Field(50, ge=0, le=2**31, description="Sample among the k likeliest tokens; 0 means all.")
    temperature: float = Field(0.8, ge=0, le=2, allow_inf_nan=False, description="0 takes the likeliest token.")

    json_schema: dict[str, Any] | None = Field(None, description="The answer is JSON of this schema.")
    regex: FormText | None = Field(None, description="The answer as a whole matches this regular expression.")
    grammar: FormText | None = Field(None, description="The answer is of this grammar, in Lark's notation.")

    @model_validator(mode="after")
    def _has_one_form(self) -> GenerateRequest:
        if sum(form is not None for form in (self.json_schema, self.regex, self.grammar)) > 1:
            raise ValueError("give one of json_schema, regex and grammar")
        return self

    def params(self, recommended: Mapping[str, float]) -> SamplingParams:
        """The request as the engine takes it; see `sampling`."""
        settings = {"max_gen_len": self.max_gen_len, "top_k": self.top_k, "temperature": self.temperature}
        return self.sampling(recommended, **settings)


class StreamOptions(BaseModel):
    """Of a streamed answer."""

    model_config = ConfigDict(strict=True)
    include_usage: bool | None = Field(None, description="Send a last chunk with the numbers of tokens.")


class OpenAIRequest(Sampling):
    """What chats and completions of OpenAI's API share. `top_k` and what `Sampling` has beyond it are extensions."""

    model: str | None = Field(None, max_length=256, description="One of /v1/models; the model served if absent.")
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False, description="0 takes the likeliest token.")
    top_k: int = Field(0, ge=-1, le=2**31, description="Sample among the k likeliest tokens; 0 or -1 means all.")
    n: int = Field(1, ge=1, le=MAX_CHOICES, description="How many answers.")
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=256, description="Taken and not used, like the next ones.")
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = Field(None, max_length=64)

    @property
    def include_usage(self) -> bool:
        """Whether the stream ends with the numbers of tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def openai_params(
        self, recommended: Mapping[str, float], max_tokens: int, logprobs: int | None, **more: Any
    ) -> SamplingParams:
        """The request as the engine takes it; see `sampling`."""
        return self.sampling(
            recommended,
            max_gen_len=max_tokens,
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            n=self.n,
            logprobs=logprobs,
            **more,
        )


def _prompts(value: Any) -> Any:
    """A prompt is a text or a list of token ids; a list of prompts stays one, and one becomes a list."""
    if isinstance(value, str) or (isinstance(value, list) and value and isinstance(value[0], int)):
        value = [value]
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PROMPTS:
        raise ValueError(f"must be a text, a list of token ids, or a list of 1 to {MAX_PROMPTS} of these")
    for prompt in value:
        is_ids = isinstance(prompt, list) and all(type(i) is int and 0 <= i < 2**31 for i in prompt)
        if not isinstance(prompt, str) and not is_ids:
            raise ValueError("must hold texts or lists of token ids alone")
        if not prompt:
            raise ValueError("a prompt is empty; give at least one token to go on from")
    return value


class CompletionRequest(OpenAIRequest):
    """A text to continue."""

    shown = {"model": "sft_best", "prompt": "The capital of France is", "max_tokens": 16}

    prompt: Annotated[
        list[Any],
        BeforeValidator(_prompts, json_schema_input_type=str | list[int] | list[str] | list[list[int]]),
    ] = Field(examples=["The capital of France is"])
    max_tokens: int = Field(16, ge=1, le=MAX_NEW_TOKENS, description="At most this many new tokens.")
    logprobs: int | None = Field(None, ge=0, le=20, description="Report as many alternatives of each token.")
    echo: bool = Field(False, description="Put the prompt before the answer, with logprobs also its tokens' own.")
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES, description="Must be n: answers are not ranked.")

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of must be n: answers are not ranked")
        if self.scores_prompt and self.stream:
            raise ValueError("echo with logprobs is not streamed; leave out stream")
        if self.scores_prompt and self.logprobs > MAX_ECHOED_LOGPROBS:
            raise ValueError(f"logprobs may be {MAX_ECHOED_LOGPROBS} at most together with echo, not {self.logprobs}")
        return self

    @property
    def scores_prompt(self) -> bool:
        """Whether the log-probabilities of the prompt's tokens are wanted, as programs that evaluate models do."""
        return self.echo and self.logprobs is not None


class FunctionCall(BaseModel):
    """A call of a function, as the model wrote it."""

    model_config = ConfigDict(strict=True)
    name: str = Field(min_length=1, max_length=256)
    arguments: Text


class ToolCall(BaseModel):
    """A call in an assistant's message."""

    model_config = ConfigDict(strict=True)
    id: str = Field(max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall


def _content(value: Any) -> Any:
    """The text of a message; several text parts are joined."""
    if not isinstance(value, list):
        return value
    if len(value) > MAX_MESSAGES:
        raise ValueError(f"has {len(value)} parts; at most {MAX_MESSAGES} are allowed")
    for part in value:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('may have parts like {"type": "text", "text": "…"} only: this model reads text')
    return "".join(part["text"] for part in value)


class ChatMessage(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True)
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        Text | None, BeforeValidator(_content, json_schema_input_type=str | list[dict[str, Any]] | None)
    ] = None
    name: str | None = Field(None, max_length=256)
    tool_calls: Annotated[list[ToolCall], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_call_id: str | None = Field(None, max_length=256)

    @model_validator(mode="after")
    def _has_content(self) -> ChatMessage:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError(f"a message of the role {self.role} needs content, a text")
        return self


class FunctionDefinition(BaseModel):
    """What a model may call."""

    model_config = ConfigDict(strict=True)
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: Text | None = None
    parameters: dict[str, Any] | None = Field(None, description="The arguments, as a JSON schema of an object.")
    strict: bool | None = None


class Tool(BaseModel):
    """A tool; functions are the only kind."""

    model_config = ConfigDict(strict=True)
    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(BaseModel):
    """A function by its name."""

    name: str = Field(max_length=64)


class ToolChoice(BaseModel):
    """The tool that has to be called."""

    model_config = ConfigDict(strict=True)
    type: Literal["function"]
    function: NamedFunction


class JsonSchema(BaseModel):
    """What an answer has to be, as a JSON schema."""

    model_config = ConfigDict(strict=True, populate_by_name=True)
    name: str = Field("answer", max_length=64)
    description: Text | None = None
    json_schema: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(BaseModel):
    """The form of the answer."""

    model_config = ConfigDict(strict=True)
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError('json_schema belongs to the type "json_schema", which needs it')
        return self


class ChatRequest(OpenAIRequest):
    """A conversation to go on with."""

    shown = {"model": "sft_best", "messages": [{"role": "user", "content": "法国的首都是哪里？"}]}

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS, description="At most this many new tokens.")
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_NEW_TOKENS, description="The same, by its newer name.")
    logprobs: bool = Field(False, description="Report the log-probability of each token.")
    top_logprobs: int | None = Field(None, ge=0, le=20, description="And of as many alternatives.")
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] = []
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: at most one call an answer.")

    @model_validator(mode="after")
    def _fits_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise ValueError("tool_choice needs tools")
        return self


class TokenizeRequest(Body):
    """A text or a conversation to be cut into tokens."""

    shown = {"prompt": "Hello"}

    model: str | None = Field(None, max_length=256)
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None = None
    add_special_tokens: bool = Field(True, description="Put the token that begins a text before the prompt.")
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] = []

    @model_validator(mode="after")
    def _is_one(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(Body):
    """Token ids to be turned into text."""

    shown = {"tokens": [72, 101]}

    model: str | None = Field(None, max_length=256)
    tokens: Annotated[list[TokenId], Field(max_length=100_000, fail_fast=True)]


class ReloadRequest(Body):
    """Another model, or the same file anew."""

    shown = {"model_path": "models/sft/sft_best.pth"}

    model_path: str | None = Field(None, max_length=4096)
