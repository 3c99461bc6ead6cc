"""The page's own API: login, chats, turns and jobs. Everything belongs to an owner, and every look-up names one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sqlite3
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from shenhong import __version__
from shenhong.errors import RequestError
from shenhong.serve.generation import FieldNames, GenerationRequest, check_prompt, start
from shenhong.serve.http import guard
from shenhong.serve.http.bodies import CheckedRoute, aside
from shenhong.serve.http.faults import Fault, bad, stopping
from shenhong.serve.http.large import LargeResponse
from shenhong.serve.hub import Hub, Served, hub_of, owner_of
from shenhong.serve.page.jobs import Job, Jobs, conversation
from shenhong.serve.page.schemas import (
    ChatChange,
    ChatNew,
    ImportedChat,
    KeptText,
    Login,
    Target,
    TurnRequest,
    TurnSettings,
)
from shenhong.serve.page.store import new_id, size_of, text_of
from shenhong.serve.page.streams import event_stream, resumed_after
from shenhong.serve.sampling import sampling_json

router = APIRouter(prefix="/api", route_class=CheckedRoute)

TITLE_CHARACTERS = 40
SMALL = 65_536  # bytes; a chat counts for no less
LONGEST_ANSWER, LONGEST_PIECE = 1024, 256  # tokens; of a document that is gone on with
After = Annotated[int | None, Query(ge=0, le=2**62)]


def jobs_of(request: Request) -> Jobs:
    return request.app.state.jobs


def no_such(what: str) -> Fault:
    return Fault(404, f"there is no such {what}", code="not_found")


@router.get("/bootstrap")
async def bootstrap(request: Request) -> Any:
    hub = hub_of(request)
    most = hub.limits.max_output_tokens
    return {
        "version": __version__,
        "models": [
            {
                "id": model.id,
                "name": model.id,
                "context": model.context,
                "template_thinking": model.template.thinking,
                "chat": model.chat,
                "domain": model.domain.hints(),
                "defaults": sampling_json(model.sampling)
                | {"max_tokens": min(most, LONGEST_ANSWER if model.chat else LONGEST_PIECE)},
                "facts": {k: v for k, v in model.facts.items() if k not in ("folder", "file")},
            }
            for model in hub.models.values()
        ],
        "limits": {"max_tokens": hub.limits.max_output_tokens},
        "auth": "key" if hub.keys else "none",
        "runs": hub.settings.runs is not None,
    }


@router.post("/login")
async def login(request: Request, body: Login) -> Response:
    hub, response = hub_of(request), Response(status_code=204)
    if hub.keys:
        response.set_cookie(
            guard.COOKIE,
            await hub.keys.login(body.key, guard.address_of(request.scope)),
            httponly=True,
            samesite="strict",
            secure=hub.settings.behind_proxy,
            max_age=90 * 24 * 3600,
        )
    return response


# ------------------------------------------------------------------------ chats


@router.get("/chats")
async def list_chats(
    request: Request,
    search: Annotated[str, Query(max_length=200)] = "",
    limit: Annotated[int, Query(ge=1, le=200)] = 50,
    before: Annotated[float | None, Query(allow_inf_nan=False)] = None,
) -> Any:
    hub, owner, text = hub_of(request), owner_of(request), search.strip()
    hub.meter.request(owner)
    if text:
        return {"chats": await hub.searched(owner, text, limit, before)}
    return {"chats": await hub.stored(hub.store.chats, owner, limit, before)}


@router.post("/chats")
async def new_chat(request: Request, body: ChatNew | None = None) -> Any:
    hub, owner = hub_of(request), owner_of(request)
    made = await hub.stored(hub.store.create_chat, owner, (body and body.title) or "")
    jobs_of(request).changed(owner).ring()
    return made


@router.post("/chats/import")
async def import_chat(request: Request, body: ImportedChat) -> Any:
    """What the JSON export wrote, under new names, so that nothing here is overwritten."""
    hub, owner = hub_of(request), owner_of(request)
    hub.meter.request(owner)
    messages = await asyncio.to_thread(_renamed, body)
    leaf = next((new["id"] for old, new in messages if old == body.leaf), None)
    size = await asyncio.to_thread(size_of, (new for _, new in messages))
    with contextlib.ExitStack() as held:
        held.enter_context(hub.reading.place(owner, size))
        made = await hub.stored(
            hub.store.create_chat, owner, body.title, [new for _, new in messages], leaf
        )
        jobs_of(request).changed(owner).ring()
        return await _sent(held, _json, made)


def _renamed(body: ImportedChat) -> list[tuple[str, dict[str, Any]]]:
    """(old id, message) in order. Fault: 400 where a parent does not come before its answers."""
    ids: dict[str, str] = {}
    made = []
    for number, message in enumerate(body.messages):
        if message.id in ids or (message.parent is not None and message.parent not in ids):
            raise bad(
                "ids must differ, and a parent stands before its answers", f"messages.{number}"
            )
        ids[message.id] = new_id()
        state = "stopped" if message.state == "running" else message.state
        new = message.model_dump() | {
            "id": ids[message.id],
            "parent": message.parent and ids[message.parent],
            "job": None,
            "state": state,
            "settings": message.settings and message.settings.model_dump(exclude_none=True),
        }
        made.append((message.id, new))
    return made


@router.get("/chats/{chat}")
async def get_chat(request: Request, chat: str) -> Any:
    with contextlib.ExitStack() as held:
        return await _sent(held, _json, await _found(request, chat, held))


def _json(chat: dict[str, Any]) -> str:
    return json.dumps(chat, ensure_ascii=False, separators=(",", ":"))


async def _sent(
    held: contextlib.ExitStack,
    write: Callable[[dict[str, Any]], str],
    chat: dict[str, Any],
    kind: str = "application/json",
    headers: dict[str, str] | None = None,
) -> Response:
    """A chat as a whole; what is held for it is let go when it is sent."""
    body = await asyncio.to_thread(lambda: write(chat).encode())
    response = LargeResponse(body, media_type=kind, headers=headers)
    response.closing = held.pop_all().close
    return response


async def _found(request: Request, chat: str, held: contextlib.ExitStack) -> dict[str, Any]:
    """A chat with all its messages, which takes a place among the readers. Fault: 404, 429."""
    hub, owner = hub_of(request), owner_of(request)
    size = hub.store.size(owner, chat)
    if size is not None:
        held.enter_context(hub.reading.place(owner, max(size, SMALL)))
    found = await hub.stored(hub.store.whole_chat, owner, chat)
    if found is None:
        raise no_such("chat")
    return found


@router.patch("/chats/{chat}")
async def change_chat(request: Request, chat: str, body: ChatChange) -> Any:
    hub, owner = hub_of(request), owner_of(request)
    with contextlib.ExitStack() as held:
        found = await _found(request, chat, held)
    if body.leaf and body.leaf not in {message["id"] for message in found["messages"]}:
        raise bad("leaf is no message of this chat", "leaf")
    changes = {k: v for k, v in body.model_dump(exclude_unset=True).items() if v is not None}
    changed = await hub.stored(hub.store.change_chat, owner, chat, changes)
    jobs_of(request).changed(owner).ring()
    return changed


@router.delete("/chats/{chat}", status_code=204)
async def delete_chat(request: Request, chat: str) -> None:
    hub, owner, jobs = hub_of(request), owner_of(request), jobs_of(request)
    if await hub.stored(hub.store.chat, owner, chat) is None:
        raise no_such("chat")
    await jobs.stop_chat(chat)
    await hub.stored(hub.store.delete_chat, owner, chat)
    jobs.changed(owner).ring()


@router.get("/chats/{chat}/export")
async def export(
    request: Request, chat: str, format: Literal["json", "markdown"] = "json"
) -> Response:
    end, kind, write = EXPORTS[format]
    disposition = f'attachment; filename="chat-{chat[:8]}.{end}"'
    with contextlib.ExitStack() as held:
        found = await _found(request, chat, held)
        return await _sent(held, write, found, kind, {"Content-Disposition": disposition})


def _exported(chat: dict[str, Any]) -> str:
    return json.dumps(chat | {"format": "shenhong-chat-1"}, ensure_ascii=False, indent=1)


def _markdown(chat: dict[str, Any]) -> str:
    """The chosen branch, for people: a document as it stands, a conversation turn by turn."""
    messages = chat["messages"]
    leaf = chat["leaf"] or (messages[-1]["id"] if messages else "")
    branch = conversation(messages, leaf)
    if any((message["settings"] or {}).get("plain") for message in messages):
        return _document(branch) + "\n"
    turns = [f"## {turn['role'].title()}\n\n{turn['content']}" for turn in branch]
    return "\n\n".join([f"# {chat['title'] or 'Chat'}", *turns]) + "\n"


EXPORTS = {
    "json": ("json", "application/json", _exported),
    "markdown": ("md", "text/markdown; charset=utf-8", _markdown),
}

# ------------------------------------------------------------------------ turns and jobs


@router.post("/chats/{chat}/turns")
async def turn(request: Request, chat: str, body: TurnRequest) -> Any:
    """A user message, or an old one again, and an answer to it from each target."""
    hub, owner, jobs = hub_of(request), owner_of(request), jobs_of(request)
    hub.meter.request(owner)
    if hub.draining:
        raise stopping()
    found, by_id = await _with_parent(request, chat, body.parent)
    now, user = time.time(), None
    if body.text is None:
        asked = by_id[body.parent or ""]
    else:
        text = await aside(len(body.text), _composed, hub, body.text, body)
        asked = user = _user(chat, body.parent, text, now)
    if asked["role"] != "user" and not all(target.settings.plain for target in body.targets):
        raise bad("answers belong to a user message", "parent")
    branch = await asyncio.to_thread(conversation, [*found["messages"], asked], asked["id"])
    started = []
    try:
        for number, target in enumerate(body.targets):
            stamp = now + (number + 1) * 1e-6  # siblings keep their order
            answer = _message(chat, asked["id"], "assistant", stamp)
            started.append(await _start(hub, owner, branch, target, answer))
        answers = [job.message for job in started]
        await hub.stored(hub.store.add_turn, owner, chat, _title(found, asked), user, answers)
    except BaseException as error:
        for job in started:
            job.stream.close()
        if isinstance(error, sqlite3.IntegrityError):  # it was deleted meanwhile
            raise no_such("chat") from None
        raise
    for job in started:
        jobs.start(job)
    jobs.changed(owner).ring()
    return {"user": user, "answers": answers}


@router.post("/chats/{chat}/texts")
async def keep(request: Request, chat: str, body: KeptText) -> Any:
    """A text of the user's that nothing answers yet: an edit of a document."""
    hub, owner = hub_of(request), owner_of(request)
    hub.meter.request(owner)
    found, _ = await _with_parent(request, chat, body.parent)
    user = _user(chat, body.parent, body.text, time.time())
    try:
        await hub.stored(hub.store.add_turn, owner, chat, _title(found, user), user, [])
    except sqlite3.IntegrityError:  # it was deleted meanwhile
        raise no_such("chat") from None
    jobs_of(request).changed(owner).ring()
    return user


async def _with_parent(
    request: Request, chat: str, parent: str | None
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """The chat and its messages by id, the parent among them. Fault: 400, 404."""
    with contextlib.ExitStack() as held:
        found = await _found(request, chat, held)
    by_id = {message["id"]: message for message in found["messages"]}
    if parent is not None and parent not in by_id:
        raise bad("parent is no message of this chat", "parent")
    return found, by_id


def _title(chat: dict[str, Any], first: dict[str, Any]) -> str | None:
    """Of a chat that has none yet."""
    return None if chat["title"] else text_of(first["parts"]).strip()[:TITLE_CHARACTERS]


def _user(chat: str, parent: str | None, text: str, created: float) -> dict[str, Any]:
    parts = [{"type": "text", "text": text}]
    return _message(chat, parent, "user", created) | {"parts": parts, "state": "done"}


def _message(chat: str, parent: str | None, role: str, created: float) -> dict[str, Any]:
    empty = dict.fromkeys(("model", "settings", "job", "usage", "timing"))
    return {
        "id": new_id(),
        "chat": chat,
        "parent": parent,
        "role": role,
        "parts": [],
        **empty,
        "state": "running",
        "created": created,
    }


async def _start(
    hub: Hub, owner: str, branch: list[dict[str, Any]], target: Target, answer: dict[str, Any]
) -> Job:
    model, started = hub.model(target.model), time.monotonic()
    settings = target.settings
    prompt, thinking = await _prompt(hub, model, branch, settings)
    generation = GenerationRequest(
        prompt,
        settings,
        max_tokens=settings.max_tokens,
        thinking=thinking,
        names=FieldNames("text", n="targets"),
    )
    (stream,) = await start(hub, model, owner, [generation])
    message = answer | {
        "model": model.id,
        "settings": settings.model_dump(exclude_none=True),
        "job": new_id(),
    }
    words = None if settings.plain else branch[-1]["content"]
    return Job(message["job"], owner, model, message, stream, generation, words, started)


def _composed(hub: Hub, text: str, body: TurnRequest) -> str:
    """The prompt for what was typed and chosen, as the domain of the first model asked writes it. Fault: 400."""
    if all(target.settings.plain for target in body.targets):
        return text
    domain = hub.model(body.targets[0].model).domain
    known = {option.name: option for option in domain.options}
    for name, value in body.options.items():
        if name not in known:
            raise bad(f"a {domain.name} has no option {name}", "options", "unknown_field")
        if known[name].choices and value not in known[name].choices:
            choices = ", ".join(known[name].choices)
            raise bad(f"{name} is one of {choices}", f"options.{name}", "invalid_value")
    try:
        return domain.compose(text, **body.options)
    except RequestError as error:
        raise bad(str(error), "options", "invalid_value") from None


def _document(branch: list[dict[str, Any]]) -> str:
    return "".join(part["content"] for part in branch)


async def _prompt(
    hub: Hub, model: Served, branch: list[dict[str, Any]], settings: TurnSettings
) -> tuple[list[int], bool | None]:
    """The tokens, and whether they end inside of thinking; None: thinking is left in the text."""
    if settings.plain:
        return await _end_of(hub, model, _document(branch), settings.max_tokens), None
    # A model that learnt from single prompts is asked with the last one alone.
    prompt, thinking = await model.template.prompt(
        branch[-1:] if model.domain.single_turn else branch
    )
    check_prompt(model, hub.limits, len(prompt), "text")
    return prompt, thinking


async def _end_of(hub: Hub, model: Served, text: str, max_tokens: int | None) -> list[int]:
    """As much of the end of a document as leaves room for what is to follow, but at least half of what the model reads."""
    tokenizer = model.llm.tokenizer
    tokens = await asyncio.to_thread(tokenizer.encode, text)
    most = min(model.context, hub.limits.max_prompt_tokens)
    room = most - min(max_tokens or LONGEST_PIECE, most // 2) - len(tokenizer.begin)
    return [*tokenizer.begin, *tokens[-max(1, room) :]]


@router.get("/jobs/{job}/events")
async def job_events(request: Request, job: str, after: After = None) -> Response:
    hub, owner, jobs = hub_of(request), owner_of(request), jobs_of(request)
    if await hub.stored(hub.store.job, owner, job) is None:
        raise no_such("job")
    return event_stream(request, jobs.listen(owner, job, resumed_after(request, after) or 0))


@router.post("/jobs/{job}/stop", status_code=204)
async def stop_job(request: Request, job: str) -> None:
    hub, owner, jobs = hub_of(request), owner_of(request), jobs_of(request)
    if await hub.stored(hub.store.job, owner, job) is None:
        raise no_such("job")
    if (running := jobs.running.get(job)) is not None:
        jobs.stop(running)
        if running.task is not None:
            await asyncio.shield(running.task)


@router.get("/events")
async def feed(request: Request, after: After = None) -> Response:
    """Changes of chats, for other tabs."""
    return event_stream(
        request, jobs_of(request).feed(owner_of(request), resumed_after(request, after))
    )
