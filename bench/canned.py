"""What is sent and what is answered: one chat request and its canned answers, of real size."""

from __future__ import annotations

import json
from typing import Any, Dict

JSON = Dict[str, Any]

VIRTUAL_KEY = "vk-bench-0123456789abcdef"
UPSTREAM_KEY = "sk-upstream-bench-0123456789"
MODELS = {"openai": "gpt-5.2", "anthropic": "claude-sonnet-4-6"}
MODEL, CLAUDE = MODELS.values()
GEMINI = "gemini-3-flash"
ALL_MODELS = {**MODELS, "gemini": GEMINI}
PROMPT_TOKENS, COMPLETION_TOKENS = 187, 48
# Stands once in every event that a client must see, and nowhere else: one byte cannot be split
# between two reads, so counting it counts events, without a parser that costs as much as the proxy.
MARK = b"~"

# What the official SDK sends with each request.
REQUEST_HEADERS = {
    "authorization": f"Bearer {VIRTUAL_KEY}",
    "content-type": "application/json",
    "accept": "application/json",
    "user-agent": "OpenAI/Python 2.8.0",
    "x-stainless-lang": "python",
    "x-stainless-package-version": "2.8.0",
    "x-stainless-runtime": "CPython",
    "x-stainless-runtime-version": "3.11.2",
    "x-stainless-retry-count": "0",
}
ANSWER_HEADERS = {
    "x-request-id": "req_0123456789abcdef0123456789abcdef",
    "openai-organization": "org-bench",
    "openai-processing-ms": "412",
    "openai-version": "2020-10-01",
    "x-ratelimit-limit-requests": "10000",
    "x-ratelimit-remaining-requests": "9999",
    "x-ratelimit-limit-tokens": "2000000",
    "x-ratelimit-remaining-tokens": "1999813",
}
USAGE: JSON = {
    "prompt_tokens": PROMPT_TOKENS,
    "completion_tokens": COMPLETION_TOKENS,
    "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS,
    "prompt_tokens_details": {"cached_tokens": 0, "audio_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0, "audio_tokens": 0},
}
SENTENCE = "The committee reads the report, asks what it costs, and writes down who does what. "


def request_body(stream: bool, prompt: str = SENTENCE * 9, model: str = MODEL) -> bytes:
    """A chat request of about 1 kB. Like most clients it does not ask for the stream's usage."""
    body: JSON = {
        "model": model,
        "stream": stream,
        "messages": [
            {"role": "system", "content": "You are a helpful assistant. Answer in one paragraph."},
            {"role": "user", "content": "Summarise this for a newcomer:\n" + prompt},
        ],
        "temperature": 0.2,
        "max_completion_tokens": 512,
    }
    return json.dumps(body, ensure_ascii=False).encode()


def asked_in(dialect: str, model: str) -> tuple[str, bytes]:
    """The path and the body of the same request, streamed, as a client of that dialect asks it."""
    asked = json.loads(request_body(True, model=model))
    system, question = (message["content"] for message in asked["messages"])
    said = [{"role": "user", "content": question}]
    paths: dict[str, tuple[str, JSON]] = {
        "chat": ("/v1/chat/completions", asked),
        "messages": ("/v1/messages", {"model": model, "stream": True, "max_tokens": 512,
                                      "system": system, "messages": said}),
        "responses": ("/v1/responses", {"model": model, "stream": True, "input": said,
                                        "instructions": system}),
        "gemini": (f"/v1beta/models/{model}:streamGenerateContent?alt=sse",
                   {"systemInstruction": {"parts": [{"text": system}]},
                    "contents": [{"role": "user", "parts": [{"text": question}]}]}),
    }  # fmt: skip
    path, body = paths[dialect]
    return path, json.dumps(body, ensure_ascii=False).encode()


def conversation(model: str) -> bytes:
    """What an agent sends after 200 turns: 1 MB of questions, calls, their results and answers."""
    messages: list[JSON] = []
    for turn in range(50):
        call = {"id": f"call_{turn}", "type": "function", "function": {
            "name": "read_file", "arguments": json.dumps({"path": "/src", "why": SENTENCE * 50})}}
        messages += [
            {"role": "user", "content": "Größe? " + SENTENCE * 64},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": call["id"], "content": "1\t# …\n" + SENTENCE * 64},
            {"role": "assistant", "content": SENTENCE * 64},
        ]
    parameters = {"type": "object", "properties": {"path": {"type": "string"}}}
    tool = {"type": "function", "function": {"name": "read_file", "parameters": parameters}}
    messages.append({"role": "user", "content": "Go on."})
    body: JSON = {"model": model, "tools": [tool], "messages": messages}
    return json.dumps(body, ensure_ascii=False).encode()


def chat_body() -> bytes:
    """A chat completion of about 1 kB."""
    message: JSON = {"role": "assistant", "content": SENTENCE * 4, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    body: JSON = {**_common("chat.completion"), "choices": [choice], "usage": USAGE}
    return json.dumps(body, indent=2).encode()


def stream_events(count: int) -> list[bytes]:
    """`count` marked events as OpenAI spells them, then the usage chunk, then [DONE]."""
    deltas: list[JSON] = [{"content": word} for word in (SENTENCE * (count // 15 + 1)).split(" ")]
    deltas = [{"role": "assistant", "content": "", "refusal": None}, *deltas[: count - 2], {}]
    marked: list[JSON] = []
    for delta in deltas:
        finish = None if delta else "stop"
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        tail = {"choices": [choice], "usage": None, "obfuscation": MARK.decode() + "aB3xK9"}
        marked.append({**_common("chat.completion.chunk"), **tail})
    usage: JSON = {**_common("chat.completion.chunk"), "choices": [], "usage": USAGE}
    texts = [json.dumps(event, separators=(",", ":")) for event in [*marked, usage]]
    return [b"data: %s\n\n" % text.encode() for text in [*texts, "[DONE]"]]


def message_body() -> bytes:
    """An answer of about 1 kB as Anthropic spells it."""
    content = [{"type": "text", "text": SENTENCE * 8}]
    return json.dumps(_message(content, "end_turn", COMPLETION_TOKENS)).encode()


def message_events(count: int) -> list[bytes]:
    """What comes to `count` events in a client's chat stream, all but two of them marked."""
    words = [MARK.decode() + word for word in (SENTENCE * (count // 15 + 1)).split(" ")]
    usage = {"output_tokens": COMPLETION_TOKENS}
    events: list[JSON] = [
        {"type": "message_start", "message": _message([], None, 1)},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "ping"},
        *({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}
          for word in words[: count - 2]),
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage},
        {"type": "message_stop"},
    ]  # fmt: skip
    texts = [(event["type"], json.dumps(event, separators=(",", ":"))) for event in events]
    return [f"event: {name}\ndata: {text}\n\n".encode() for name, text in texts]


def _words(count: int) -> list[str]:
    return [MARK.decode() + word for word in (SENTENCE * (count // 15 + 1)).split(" ")][:count]


def gemini_events(count: int) -> list[bytes]:
    """So many marked chunks as Gemini spells them, the usage on each."""
    told = {"modelVersion": GEMINI, "responseId": "mAitaLmkHPPlz7IPvtfUqQ4"}
    usage = {"promptTokenCount": PROMPT_TOKENS, "candidatesTokenCount": COMPLETION_TOKENS,
             "totalTokenCount": PROMPT_TOKENS + COMPLETION_TOKENS}  # fmt: skip
    candidates = [{"content": {"parts": [{"text": word}], "role": "model"}, "index": 0}
                  for word in _words(count)]  # fmt: skip
    candidates.append({"content": {"parts": [{"text": ""}], "role": "model"}, "index": 0,
                       "finishReason": "STOP"})  # fmt: skip
    return [b"data: %s\n\n" % json.dumps(
        {"candidates": [each], "usageMetadata": usage, **told}, separators=(",", ":")).encode()
        for each in candidates]  # fmt: skip


def responses_events(count: int) -> list[bytes]:
    """So many marked deltas as OpenAI's Responses spell them, and what stands around them."""
    response: JSON = {"id": "resp_67ccd2bed1ec8190", "object": "response", "created_at": 1765432100,
                      "model": MODEL, "status": "in_progress", "output": []}  # fmt: skip
    item: JSON = {"id": "msg_67ccd2bed1ec8190", "type": "message", "role": "assistant"}
    place = {"item_id": item["id"], "output_index": 0, "content_index": 0}
    usage = {"input_tokens": PROMPT_TOKENS, "output_tokens": COMPLETION_TOKENS,
             "total_tokens": PROMPT_TOKENS + COMPLETION_TOKENS}  # fmt: skip
    part = {"type": "output_text", "text": "", "annotations": []}
    events: list[JSON] = [
        {"type": "response.created", "response": response},
        {"type": "response.output_item.added", "output_index": 0, "item": {**item, "content": []}},
        {"type": "response.content_part.added", **place, "part": part},
        *({"type": "response.output_text.delta", **place, "delta": word, "logprobs": []}
          for word in _words(count)),
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed",
         "response": {**response, "status": "completed", "output": [item], "usage": usage}},
    ]  # fmt: skip
    numbered = [{**event, "sequence_number": number} for number, event in enumerate(events)]
    return [f"event: {event['type']}\ndata: {json.dumps(event, separators=(',', ':'))}\n\n".encode()
            for event in numbered]  # fmt: skip


def _message(content: list[JSON], stop: str | None, output_tokens: int) -> JSON:
    usage = {"input_tokens": PROMPT_TOKENS, "cache_creation_input_tokens": 0,
             "cache_read_input_tokens": 0, "output_tokens": output_tokens}  # fmt: skip
    identity = {"id": "msg_01XFDUDYJgAACzvnptvVoYEL", "type": "message", "role": "assistant"}
    ending = {"stop_reason": stop, "stop_sequence": None, "usage": usage}
    return {**identity, "model": CLAUDE, "content": content, **ending}


def _common(kind: str) -> JSON:
    identity = {"id": "chatcmpl-BxT9QwErTyUiOpAsDfGhJkLzXcVbNm", "object": kind}
    return {**identity, "created": 1765432100, "model": MODEL + "-2025-12-11"}
