"""The HTTP side of the server: reads requests within limits, hands them to the worker, and writes what comes back."""

import asyncio
import contextlib
import dataclasses
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException as AnyHTTPException

from based_megatron.errors import ConfigError
from based_megatron.inference.text import TextRequest
from based_megatron.serving import protocol
from based_megatron.serving.cli import Limits
from based_megatron.serving.metrics import metrics
from based_megatron.serving.worker import CLOSED, Job, Part, QueueFull, Worker, count

TIMEOUT = "timeout"
OPEN_PATHS = {"/health"}
"""What a client without the token may ask."""


def build_app(worker: Worker, name: str, limits: Limits, token: str | None = None) -> FastAPI:
    """The application over a worker, which it starts and stops. token: what clients must send; None for no secret."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.stop()

    app = FastAPI(lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None)
    created = int(time.time())

    @app.middleware("http")
    async def authorise(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        if token is not None and request.url.path not in OPEN_PATHS:
            given = request.headers.get("authorization", "").encode()
            if not secrets.compare_digest(given, f"Bearer {token}".encode()):
                return refusal(HTTPStatus.UNAUTHORIZED, "the API key of this server is another one", "invalid_api_key")
        return await call_next(request)

    def refusal(status: int, message: str, code: str | None = None) -> JSONResponse:
        count(worker.counts.refused, int(status))
        kind = "server_error" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else "invalid_request_error"
        headers = {"Retry-After": "1"} if status == HTTPStatus.TOO_MANY_REQUESTS else {}
        return JSONResponse(protocol.error(message, kind, code), int(status), headers)

    @app.exception_handler(AnyHTTPException)
    async def refuse(_: Request, error: AnyHTTPException) -> JSONResponse:
        return refusal(error.status_code, str(error.detail))

    @app.exception_handler(ConfigError)
    async def refuse_request(_: Request, error: ConfigError) -> JSONResponse:
        return refusal(HTTPStatus.BAD_REQUEST, str(error))

    @app.get("/health")
    async def health() -> JSONResponse:
        if worker.is_alive:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "the decoder has failed"}, HTTPStatus.SERVICE_UNAVAILABLE)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        card = {"id": name, "object": "model", "created": created, "owned_by": "based"}
        return {"object": "list", "data": [card]}

    @app.get("/metrics")
    async def numbers() -> PlainTextResponse:
        return PlainTextResponse(metrics(worker))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        deadline = time.monotonic() + limits.request_seconds
        asked = protocol.read_completion(await read_json(request, limits), name, limits.max_new_tokens)
        asked = await tokenized(worker, asked, limits)
        loop, parts = asyncio.get_running_loop(), asyncio.Queue[Part]()
        jobs = [Job(index, each, loop, parts) for index, each in enumerate(asked.requests)]
        if len(jobs) > limits.queue:
            raise ConfigError(f"prompt has {len(jobs)} texts, more than the {limits.queue} that may wait: send fewer")
        if not worker.is_alive:
            raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, "the decoder has failed: the server must be restarted")
        try:
            worker.submit(jobs)
        except QueueFull:
            raise HTTPException(HTTPStatus.TOO_MANY_REQUESTS, "too many requests wait: try again later") from None
        # Also of an answer that was never begun: what has not ended when nobody waits any more is cancelled.
        gone = asyncio.ensure_future(disconnected(request))
        gone.add_done_callback(lambda _: worker.cancel(jobs))
        answer = followed(jobs, parts, gone, deadline)
        if asked.streams:
            return StreamingResponse(events(asked, answer, name), media_type="text/event-stream")
        return await collected(asked, answer, name)

    return app


async def read_json(request: Request, limits: Limits) -> Any:
    """The body of a request. Raises ConfigError, and HTTPException if it is too large or comes too slowly."""
    too_large = HTTPException(
        HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body has more than the {limits.max_body_bytes} bytes that are read"
    )
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > limits.max_body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                body += piece
                if len(body) > limits.max_body_bytes:
                    raise too_large
    except TimeoutError:
        raise HTTPException(HTTPStatus.REQUEST_TIMEOUT, "the body of the request came too slowly") from None
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the body is no JSON: {str(error)[:100]}") from None


async def tokenized(worker: Worker, asked: protocol.Asked, limits: Limits) -> protocol.Asked:
    """The request with tokens for prompts. Long texts take time, which neither other clients nor the decoder wait for."""

    def encode() -> tuple[TextRequest, ...]:
        found = []
        for request in asked.requests:
            tokens = worker.decoder.encode(request.prompt)
            if len(tokens) > limits.max_prompt_tokens:
                raise ConfigError(f"prompt has {len(tokens)} tokens, more than the {limits.max_prompt_tokens} served")
            found.append(dataclasses.replace(request, prompt=tokens))
        return tuple(found)

    return dataclasses.replace(asked, requests=await asyncio.to_thread(encode))


async def followed(
    jobs: list[Job], parts: asyncio.Queue[Part], gone: asyncio.Future[None], deadline: float
) -> AsyncGenerator[Part]:
    """Parts of all jobs, until the last has ended, the client has gone, or the time is over."""
    left = {job.index for job in jobs}
    arriving: asyncio.Future[Part] | None = None
    try:
        while left and not gone.done():
            arriving = arriving or asyncio.ensure_future(parts.get())
            seconds = max(0.0, deadline - time.monotonic())
            either: set[asyncio.Future[Any]] = {arriving, gone}
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if arriving.done():
                part, arriving = arriving.result(), None
                left -= {part.index} if part.finish is not None else set()
                yield part
            elif not gone.done():
                for index in sorted(left):
                    yield Part(index, "", 0, TIMEOUT)
                return
    finally:
        gone.cancel()
        if arriving is not None:
            arriving.cancel()


async def disconnected(request: Request) -> None:
    """Wait until the client has gone; its body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def collected(asked: protocol.Asked, answer: AsyncGenerator[Part], name: str) -> JSONResponse:
    """The whole answer at once."""
    texts, tokens = [""] * len(asked.requests), 0
    ends: list[str | None] = [None] * len(asked.requests)
    async with contextlib.aclosing(answer):
        async for part in answer:
            texts[part.index] += part.text
            tokens += part.tokens
            ends[part.index] = part.finish
    if CLOSED in ends:
        raise HTTPException(HTTPStatus.INTERNAL_SERVER_ERROR, "the decoder has failed")
    choices = [protocol.choice(index, text, ends[index]) for index, text in enumerate(texts)]
    return JSONResponse(protocol.Answer(name).of(choices, protocol.usage(prompt_tokens(asked), tokens)))


async def events(asked: protocol.Asked, answer: AsyncGenerator[Part], name: str) -> AsyncIterator[str]:
    """The answer as server-sent events, each of the new text of one prompt."""
    head, tokens = protocol.Answer(name), 0
    async with contextlib.aclosing(answer):
        async for part in answer:
            tokens += part.tokens
            if part.finish == CLOSED:
                yield event(protocol.error("the decoder has failed", "server_error"))
                return
            if part.text or part.finish is not None:
                yield event(head.of([protocol.choice(part.index, part.text, part.finish)]))
    if asked.counts_usage:
        yield event(head.of([], protocol.usage(prompt_tokens(asked), tokens)))
    yield "data: [DONE]\n\n"


def event(value: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(value)}\n\n"


def prompt_tokens(asked: protocol.Asked) -> int:
    """Tokens of all prompts, which have been tokenized."""
    return sum(len(request.prompt) for request in asked.requests)
