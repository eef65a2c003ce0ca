"""The Gemini wire as Google speaks it: what generateContent and streamGenerateContent take, and
their answers as a body and as a stream.

The shapes are the google-genai SDK's own types, which forbid what they do not name; the REST body
has no type of its own, so it is put together here. What the server demands beyond a type is said by
the generators below, in its own words where they are known.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import count, groupby, pairwise
from typing import Any, NamedTuple

from drive import UPSTREAM_KEY
from google.genai import types
from google.genai._common import BaseModel
from pydantic import ValidationError
from upstream import JSON, Answer, Received, Reply, closed, json_reply, parts, sse_reply

# ---- what it takes ----


class Request(BaseModel):
    """The body; the SDK's class has the camelCase names, and forbids all others."""

    contents: list[types.Content]
    system_instruction: types.Content | None = None
    tools: list[types.Tool] | None = None
    tool_config: types.ToolConfig | None = None
    safety_settings: list[types.SafetySetting] | None = None
    generation_config: types.GenerationConfig | None = None
    cached_content: str | None = None
    continuation_token: str | None = None
    service_tier: types.ServiceTier | None = None
    store: bool | None = None
    labels: dict[str, str] | None = None


Request.model_rebuild(_types_namespace=globals())
read_shape = closed(Request)
read_response = closed(types.GenerateContentResponse)

PLACEHOLDER = "skip_thought_signature_validator"
DATA = {"text", "inlineData", "fileData", "functionCall", "functionResponse"}
DATA |= {"executableCode", "codeExecutionResult", "toolCall", "toolResponse"}
TOOL_NAME = "[A-Za-z_][A-Za-z0-9_.:-]{0,127}"
IN_SCHEMAS = {
    *("$id", "$defs", "$ref", "$anchor", "type", "format", "title", "description", "enum", "items"),
    *("prefixItems", "minItems", "maxItems", "minimum", "maximum", "anyOf", "oneOf", "properties"),
    *("additionalProperties", "required", "propertyOrdering"),
}
BUDGETS = {"pro": (128, 32768), "flash": (0, 24576), "flash-lite": (512, 24576)}


class Gemini(NamedTuple):
    """What a model is: its version, and its family."""

    version: tuple[int, int]
    family: str

    @property
    def has_ids(self) -> bool:
        """Whether it gives its calls ids and signatures, and wants them back."""
        return self.version >= (3, 0)

    @property
    def levels(self) -> set[str]:
        if not self.has_ids:
            return set()
        is_quick = self.family.startswith("flash") and self.version <= (3, 6)
        return {"LOW", "MEDIUM", "HIGH"} | ({"MINIMAL"} if is_quick else set())


def gemini(name: str) -> Gemini:
    """Read off a model's name what it is."""
    found = re.fullmatch(r"gemini-(\d+)(?:\.(\d+))?-([a-z]+(?:-lite)?)(?:-preview)?", name)
    assert found, f"models/{name} is not found"
    return Gemini((int(found[1]), int(found[2] or 0)), found[3])


def model_of(received: Received) -> str:
    return received.path.rpartition("/")[2].partition(":")[0]


def judge(received: Received) -> None:
    """Raise if Gemini would not take this request."""
    judge_head(received)
    is_stream = received.path.endswith(":streamGenerateContent")
    assert received.query == ("alt=sse" if is_stream else ""), received.query
    complaints = list(judge_body(received.json, model_of(received)))
    assert not complaints, complaints


def judge_head(received: Received) -> None:
    head = received.headers
    assert head.getall("x-goog-api-key") == [UPSTREAM_KEY], head
    assert not {"authorization", "x-api-key"} & {name.lower() for name in head}, head
    assert "key=" not in received.query, "a key in a URL is a key in a log"
    assert head["content-type"] == "application/json", head


MODELS = [
    *("gemini-2.5-flash", "gemini-2.5-flash-lite", "gemini-2.5-pro", "gemini-3.1-pro-preview"),
    *("gemini-3.5-flash", "gemini-3.8-flash", "gemini-4-argon"),
]
# The SDK asks under /v1 by default, all others under /v1beta.
JUDGES = {
    f"/{version}/models/{model}:{method}": rule
    for version in ("v1", "v1beta")
    for model in [*MODELS, "gemini-embedding-2"]
    for method, rule in {
        "generateContent": judge,
        "streamGenerateContent": judge,
        "countTokens": judge_head,
        "embedContent": judge_head,
        "batchEmbedContents": judge_head,
    }.items()
}


def judge_body(body: JSON, name: str) -> Iterator[str]:
    """Yield every rule that the body breaks."""
    try:
        shape = read_shape(json.dumps(body))
    except ValidationError as error:
        yield f"Invalid JSON payload received. Unknown name: {str(error)[:2000]}"
        return
    # From here on every name is in camelCase, whichever of its two spellings came.
    body = shape.model_dump(mode="json", by_alias=True, exclude_none=True)
    model = gemini(name)
    contents = list(_merged(body["contents"]))
    yield from _turns(contents)
    yield from _parts(contents, model)
    yield from _signatures(contents, model)
    yield from _tools(body, model)
    yield from _config(body.get("generationConfig", {}), model)
    system = body.get("systemInstruction", {"parts": [{"text": "-"}]})
    if not all(part.get("text") for part in system.get("parts") or [{}]):
        yield "systemInstruction: must have text, and only that"
    if body.get("serviceTier", "flex") not in ("standard", "flex", "priority"):
        yield f"Invalid value at 'service_tier': {body['serviceTier']}"


def _merged(contents: list[JSON]) -> Iterator[JSON]:
    """Yield the turns: Google's SDK tells a streamed one in as many contents as it had chunks."""
    for role, group in groupby(contents, lambda content: content.get("role")):
        each = list(group)
        if role != "model":
            yield from each
        else:
            yield {"role": role, "parts": [part for one in each for part in one.get("parts", ())]}


def of_kind(kind: str, content: JSON) -> list[JSON]:
    """Return what parts of this kind hold."""
    return [part[kind] for part in content.get("parts", ()) if kind in part]


def _turns(contents: list[JSON]) -> Iterator[str]:
    roles = [content.get("role") for content in contents]
    if not set(roles) <= {"user", "model"}:
        yield f"Please use a valid role: user, model. {roles}"
    if roles[-1:] != ["user"]:
        yield "Please ensure that the conversation ends with a user role or a function response."
    if not all(content.get("parts") for content in contents):
        yield "contents.parts must not be empty."
    for before, content in pairwise([{"role": "model"}, *contents]):
        calls, results = of_kind("functionCall", before), of_kind("functionResponse", content)
        if len(calls) != len(results):
            yield "The number of function response parts must equal that of function call parts."
        elif _joins(calls, results) != _joins(results, results):
            yield f"Function responses in another order, or of other calls: {calls}, {results}"
        if results and of_kind("text", content):
            yield "text beside function responses"
        if of_kind("functionCall", content) and before["role"] != "user":
            yield "A function call must come immediately after a user or function response turn."
    for content in contents:
        wrong = "functionResponse" if content.get("role") == "model" else "functionCall"
        if of_kind(wrong, content):
            yield f"{wrong} in a turn of role {content['role']}"


def _joins(made: list[JSON], results: list[JSON]) -> list[Any]:
    """Return what joins calls and results: Google's SDK, which calls by itself, sends no ids."""
    has_ids = any("id" in result for result in results)
    return [(each.get("name"), each.get("id") if has_ids else None) for each in made]


def _parts(contents: list[JSON], model: Gemini) -> Iterator[str]:
    for content in contents:
        if "" in of_kind("text", content) and content.get("role") == "user":
            yield "Unable to submit request because it must have a text parameter."
    for part in (part for content in contents for part in content.get("parts", ())):
        if len(DATA & part.keys()) != 1:
            yield f"contents.parts: must have one initialized field: {list(part)}"
        for media in (part[kind] for kind in ("inlineData", "fileData") if kind in part):
            if not media.get("mimeType") or not (media.get("data") or media.get("fileUri")):
                yield f"media without type or data: {media}"
        if '"$ref":' in json.dumps(part.get("functionResponse", {}).get("response")):
            yield "function_response.response: $ref"
        if of_kind("inlineData", part.get("functionResponse", {})) and not model.has_ids:
            yield "function_response.parts: not supported by this model"
        for made in (part[kind] for kind in ("functionCall", "functionResponse") if kind in part):
            if "id" in made and not model.has_ids:
                yield 'Unknown name "id"'
        if not part.get("functionCall", {"id": "-"}).get("id") and model.has_ids:
            yield "function call without an id"
            if "__ts_" in made.get("id", ""):
                yield f"an id that nobody gave: {made['id']}"
            if not re.fullmatch(TOOL_NAME, made.get("name", "")):
                yield f"Invalid function name: {made}"


def _signatures(contents: list[JSON], model: Gemini) -> Iterator[str]:
    """The upstream knows what it signed: all that has a signature, and the calls it `gave`."""
    turn_starts = 0
    for at, content in enumerate(contents):
        is_user = content.get("role") == "user"
        turn_starts = at if is_user and not of_kind("functionResponse", content) else turn_starts
        for part in content.get("parts", ()):
            if part.get("thoughtSignature", PLACEHOLDER) not in (PLACEHOLDER, url_safe(sign(part))):
                yield f"Corrupted thought signature: {part}"
    if not model.has_ids:
        return
    for content in contents[turn_starts:]:
        calls = [part for part in content.get("parts", ()) if "functionCall" in part]
        signatures = [part.get("thoughtSignature") for part in calls]
        if signatures[:1] == [None]:
            yield "Function call is missing a thought_signature in functionCall parts."
        if signatures[:1] == [PLACEHOLDER] and gave(calls[0]):
            yield f"a placeholder for the signature that was given with {calls[0]}"
        if PLACEHOLDER in signatures[1:]:
            yield "a placeholder that nobody needs"


def _tools(body: JSON, model: Gemini) -> Iterator[str]:
    tools = body.get("tools", ())
    declared = [each for tool in tools for each in tool.get("functionDeclarations", ())]
    names = [each.get("name", "") for each in declared]
    choice = body.get("toolConfig", {}).get("functionCallingConfig")
    if len(names) != len(set(names)):
        yield f"Duplicate function declaration found: {names}"
    if not all(re.fullmatch(TOOL_NAME, name) for name in names):
        yield f"Invalid function name. Must start with a letter or an underscore: {names}"
    for each in declared:
        schema = each.get("parametersJsonSchema", {"type": "object", "properties": {"-": {}}})
        if {"parameters", "parametersJsonSchema"} <= each.keys():
            yield "parameters and parametersJsonSchema cannot both be set."
        if schema.get("type") != "object" or not schema.get("properties"):
            yield "parametersJsonSchema: should be non-empty for OBJECT type"
        if any(len(name) > 64 for name in schema.get("properties", ())):
            yield "parametersJsonSchema: parameter name too long"
    if names and any("googleSearch" in tool for tool in tools) and not model.has_ids:
        yield "Tool use with function calling is unsupported."
    if choice is not None:
        allowed = choice.get("allowedFunctionNames", [])
        if choice.get("mode") not in ("AUTO", "ANY", "NONE", "VALIDATED"):
            yield f"Invalid value at function_calling_config.mode: {choice}"
        if not names:
            yield "Function calling config is set without function_declarations."
        if allowed and choice["mode"] not in ("ANY", "VALIDATED"):
            yield "allowed_function_names: only with function calling mode ANY."
        if not set(allowed) <= set(names):
            yield f"allowed_function_names: {allowed} are not all declared"
    if names and "responseMimeType" in body.get("generationConfig", {}) and not model.has_ids:
        yield "Function calling with a response mime type: 'application/json' is unsupported"


def _config(config: JSON, model: Gemini) -> Iterator[str]:
    limits = {"temperature": (0, 2), "topP": (0, 1), "logprobs": (0, 20), "candidateCount": (1, 8)}
    limits["maxOutputTokens"] = (1, 2**31 - 1)
    for key, (least, most) in limits.items():
        if not least <= config.get(key, least) <= most:
            yield f"generation_config.{key}: {config[key]} is not in [{least}, {most}]"
    if {"presencePenalty", "frequencyPenalty"} & config.keys() and model.has_ids:
        yield "Penalty is not enabled for this model"
    stops = config.get("stopSequences", ["-"])
    if not 0 < len(stops) <= 5 or not all(stops):
        yield f"stop_sequences: at most 5, none of them empty: {stops}"
    if "logprobs" in config and not config.get("responseLogprobs"):
        yield "logprobs needs response_logprobs"
    schemas = [config[key] for key in ("responseSchema", "responseJsonSchema") if key in config]
    if len(schemas) > 1:
        yield "response_schema and response_json_schema cannot both be set."
    if schemas and config.get("responseMimeType") not in ("application/json", "text/x.enum"):
        yield "response_mime_type must be application/json when a schema is set."
    if "responseJsonSchema" in config:
        yield from _schema(config["responseJsonSchema"])
    yield from _thinking(config.get("thinkingConfig", {}), model)


def _thinking(thinking: JSON, model: Gemini) -> Iterator[str]:
    level, budget = thinking.get("thinkingLevel"), thinking.get("thinkingBudget")
    if level is not None and budget is not None:
        yield "You can only set one of thinking budget and thinking level."
    if level is not None and level not in model.levels:
        yield f"Thinking level {level} is not supported for this model."
    if budget is not None:
        least, most = BUDGETS.get(model.family, (0, 0))
        if model.has_ids:
            yield "Thinking budget is not supported for this model."
        elif budget != -1 and not (least <= budget <= most or (budget == 0 and least != 128)):
            yield f"The thinking budget {budget} is invalid. Choose one of {least} to {most}."


def _schema(schema: Any) -> Iterator[str]:
    if not isinstance(schema, dict):
        return  # `additionalProperties: false`
    if unknown := schema.keys() - IN_SCHEMAS:
        yield f"response_json_schema: Unknown name {unknown}"
    named = [*schema.get("properties", {}).values(), *schema.get("$defs", {}).values()]
    lists = [schema.get(key, ()) for key in ("anyOf", "oneOf", "prefixItems")]
    single = [schema.get(key) for key in ("items", "additionalProperties")]
    for inner in (*named, *sum(map(list, lists), []), *single):
        yield from _schema(inner)


# ---- what it answers ----

HEADERS = {"server_timing": "gfet4t7; dur=900", "x_gemini_service_tier": "standard"}
NUMBERS = count(1)
USAGE = {
    "promptTokenCount": 20,
    "cachedContentTokenCount": 8,
    "toolUsePromptTokenCount": 4,
    "candidatesTokenCount": 10,
    "thoughtsTokenCount": 20,
    "totalTokenCount": 54,
    "promptTokensDetails": [{"modality": "TEXT", "tokenCount": 20}],
}


def sign(part: JSON) -> str:
    """Return the signature that this upstream gives: each call has its own, all text has one."""
    made = {key: part.get("functionCall", {}).get(key) for key in ("name", "args")}
    spelled = json.dumps(made, sort_keys=True).encode()
    # Of a length that needs padding, and of bytes that differ between base64's two alphabets.
    return base64.b64encode(b"\xfb\xff\xfe\x3f" + hashlib.sha256(spelled).digest() * 2).decode()


def url_safe(signature: str) -> str:
    return signature.replace("+", "-").replace("/", "_")


def signed(part: JSON) -> JSON:
    return {**part, "thoughtSignature": sign(part)}


def text(told: str) -> JSON:
    return {"text": told}


def thought(told: str) -> JSON:
    return {"text": told, "thought": True}


def given(number: int) -> str:
    """Return an id as this upstream gives it, by which it knows its calls again."""
    return f"given-{number}"


def gave(part: JSON) -> bool:
    return part["functionCall"].get("id", "").startswith(given(0)[:-1])


def call(number: int, name: str, **arguments: Any) -> JSON:
    """Return a call as a new model makes it; an old one gives no id, and signs nothing."""
    return {"functionCall": {"id": given(number), "name": name, "args": arguments}}


def grounding(*cited: tuple[int, int, str]) -> JSON:
    """Return the metadata that cite pages; the places in the text are counted in bytes."""
    chunks = [{"web": {"uri": uri, "title": "A page"}} for _, _, uri in cited]
    places = [{"startIndex": start, "endIndex": end} for start, end, _ in cited]
    supports = [
        {"segment": place, "groundingChunkIndices": [index]} for index, place in enumerate(places)
    ]
    return {"groundingMetadata": {"groundingChunks": chunks, "groundingSupports": supports}}


def response(*told: JSON, finish: str = "STOP", **more: Any) -> JSON:
    """Return a whole answer, as `generateContent` gives it; `more` is of its candidate."""
    content = {"role": "model", "parts": list(told)}
    candidate = {"content": content, "index": 0, "finishReason": finish, **more}
    return {"candidates": [candidate], "usageMetadata": USAGE, **head()}


def head() -> JSON:
    """Return what is the same in all chunks of an answer, and in no other answer."""
    return {"modelVersion": "gemini-answered", "responseId": f"sJ0kaYrzD5CZz7IPq8{next(NUMBERS)}"}


def as_model_tells(told: Iterator[JSON] | tuple[JSON, ...], model: Gemini) -> Iterator[JSON]:
    """Yield the parts as a model of this generation tells them: the new ones sign a step's call."""
    has_signed = False
    for part in told:
        if "functionCall" not in part:
            yield part
        elif not model.has_ids:
            made = part["functionCall"]
            yield {"functionCall": {key: made[key] for key in made if key != "id"}}
        else:
            yield part if has_signed else signed(part)
            has_signed = True


def chunks(whole: JSON) -> list[JSON]:
    """Return the stream that spells the same answer: the end comes alone, after all content.

    A good end has a part, or the SDK's chats forget the turn; one that is cut may have no content.
    """
    (candidate,) = whole["candidates"]
    ending = {key: candidate[key] for key in candidate if key != "content"}
    pieces = [piece for part in candidate["content"]["parts"] for piece in _pieces(part)]
    is_signature = pieces[-1:] and "thoughtSignature" in pieces[-1] and not pieces[-1].get("text")
    last = [pieces.pop()] if is_signature and "text" in pieces[-1] else [text("")]
    told = [_chunk(whole, at, [piece], {"index": 0}) for at, piece in enumerate(pieces)]
    is_good = candidate["finishReason"] == "STOP"
    end = _chunk(whole, 0, last, ending) if is_good else {**whole, "candidates": [ending]}
    return [*told, {**end, "usageMetadata": whole["usageMetadata"]}]


def _pieces(part: JSON) -> Iterator[JSON]:
    if "text" not in part:
        yield part
        return
    head = {"thought": True} if part.get("thought") else {}
    yield from ({"text": piece, **head} for piece in parts(part["text"]))
    if "thoughtSignature" in part:
        yield {"text": "", "thoughtSignature": part["thoughtSignature"]}


def _chunk(whole: JSON, at: int, told: list[JSON], candidate: JSON) -> JSON:
    """Return a chunk with the usage until now, which each of them has, and which grows."""
    made = min(at, 9)
    usage = {"promptTokenCount": 20, "candidatesTokenCount": made, "totalTokenCount": 20 + made}
    content = {"role": "model", "parts": told}
    return {**whole, "candidates": [{"content": content, **candidate}], "usageMetadata": usage}


def stream(*told: JSON, end: str = "whole") -> Reply:
    """Return a streamed answer of these chunks; Google ends its lines as HTTP does."""
    for chunk in told:
        if "error" not in chunk:
            read_response(json.dumps(chunk))
    reply = sse_reply(told, end, named=False, **HEADERS)
    return replace(reply, pieces=[piece.replace(b"\n", b"\r\n") for piece in reply.pieces])


def answer(*told: JSON, finish: str = "STOP", usage: JSON = USAGE, **more: Any) -> Answer:
    """Answer with these parts, as a body or as a stream, as the model that is asked tells them."""

    def reply(received: Received) -> Reply:
        model = gemini(model_of(received))
        whole = response(*as_model_tells(told, model), finish=finish, **more)
        return _tell({**whole, "usageMetadata": usage}, received)

    return reply


def blocked(reason: str) -> Answer:
    """Answer that the prompt was not even looked at."""
    usage = {"promptTokenCount": 20, "totalTokenCount": 20}
    whole = {"promptFeedback": {"blockReason": reason}, "usageMetadata": usage, **head()}
    return lambda received: _tell(whole, received)


def _tell(whole: JSON, received: Received) -> Reply:
    read_response(json.dumps(whole))
    if received.path.endswith(":streamGenerateContent"):
        return stream(*(chunks(whole) if "candidates" in whole else [whole]))
    return json_reply(whole, 200, **HEADERS)


def error_body(status: int, kind: str, told: str, *details: Mapping[str, Any]) -> JSON:
    error: JSON = {"code": status, "message": told, "status": kind}
    return {"error": {**error, "details": list(details)} if details else error}


def error(status: int, kind: str, told: str, *details: Mapping[str, Any]) -> Reply:
    """Return an error as Google answers it."""
    return json_reply(error_body(status, kind, told, *details), status, **HEADERS)


RPC = "type.googleapis.com/google.rpc."
RETRY = {"@type": f"{RPC}RetryInfo", "retryDelay": "31.4s"}
BAD_KEY = {"@type": f"{RPC}ErrorInfo", "reason": "API_KEY_INVALID", "domain": "googleapis.com"}
# What says that the key is not good, and is therefore nobody's business but the operator's.
KEY_ERRORS: dict[str, tuple[Any, ...]] = {
    "invalid": (400, "INVALID_ARGUMENT", "API key not valid. Pass a valid API key.", BAD_KEY),
    "unauthenticated": (401, "UNAUTHENTICATED", "Request had invalid credentials."),
    "unregistered": (
        *(403, "PERMISSION_DENIED"),
        "Method doesn't allow unregistered callers (callers without established identity).",
    ),
}
# What a stream may begin with instead of an answer, and the status that a client must see.
FIRST_ERRORS = [(503, "UNAVAILABLE"), (429, "RESOURCE_EXHAUSTED"), (500, "INTERNAL")]
