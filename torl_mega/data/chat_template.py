"""Prompts and tool results of a chat model, token for token as its own chat template writes them.

    system, problem, schemas ─► prompt ─► sampled … end ─► results ─► sampled … end
                                                    └── what the template puts between two turns of the assistant

The template is rendered with place-holders first, so that it is known which characters are its own. Only those become special
tokens: what looks like one in a problem or a tool's result stays text. What was sampled is never rendered.

That this may be done is proven when a run starts, for this tokenizer and these schemas, else `DataError` names the message that
breaks it: a conversation that goes on begins with what stood there before (append-only), what is between two turns does not depend
on the turns, and the ids are those of `apply_chat_template`.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

from torl_mega.data.tokenizer import Tokenizer
from torl_mega.errors import DataError

CHAT = "chat"
"""What `data.template` says for it."""

Message = Mapping[str, Any]
Part = tuple[str, bool]  # text, whether the template wrote it

ASSISTANT = 1_000  # numbers of place-holders: results from 0, assistants' turns from here
PROBLEM = 2_000
SYSTEM = 3_000

TODAY = datetime.date(2024, 7, 26)
"""What a template that writes today's date is told (Llama 3.1's own default): a prompt must be the same tomorrow."""

THOUGHTS = (("<think>", "</think>"), ("[THINK]", "[/THINK]"), ("<thinking>", "</thinking>"))
"""Marks of thoughts that templates look for."""

ALSO_CLOSE = ("<|eom_id|>",)
"""Llama 3.1's end of a message after which the result of a call is to follow, not the user."""


class ChatTemplate:
    """`tools`: schemas as OpenAI's API has them. `result_role`: of the messages that hold results. `arguments`: more for the
    template, such as `enable_thinking`. Raises DataError for a template that cannot be used."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        system: str | None = None,
        tools: Sequence[Mapping[str, Any]] = (),
        result_role: str = "tool",
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._head: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self._tools = list(tools)
        self._role = result_role
        # results between two turns, as they are tried; users' messages do not follow each other
        self._names = (("a",), ("a", "b")) if result_role == "tool" else (("",),)
        reserved = sorted(set(arguments or {}) & tokenizer.chat_keywords)
        if reserved:
            raise DataError(f"data.chat_arguments has {reserved[0]}, which is no argument of a template; leave it out")
        self._arguments = {"strftime_now": TODAY.strftime, **(arguments or {})}
        self._source = tokenizer.chat_template(for_tools=bool(tools))
        self._proven_with_system = False
        self._between = lru_cache(maxsize=64)(self._render_between)
        self._frame = self._split(self._first([_hole(PROBLEM)]), [PROBLEM])
        # longest first; what the template itself writes, and what looks like a mark, which leaves added words and spaces out
        self._marks = tuple(
            t
            for t in sorted(tokenizer.added, key=len, reverse=True)
            if t.strip() and (t in self._source or (t[0] in "<[" and len(t) > 2))
        )
        self._mark_ids = frozenset(tokenizer.added[mark] for mark in self._marks)
        self._pattern = re.compile("|".join(map(re.escape, self._marks)) or r"(?!)")
        self.closing = self._prove()
        """What closes an assistant's turn, a special token."""
        self.closings = (self.closing, *(mark for mark in ALSO_CLOSE if mark in self._marks))
        self.end_ids = tuple(tokenizer.added[mark] for mark in self.closings)
        """Of what may close a turn; the template's own comes first."""
        self.begun = self._begun_thought()
        """A thought that the template itself begins an assistant's turn with; empty for most."""

    def prompt(self, problem: str, system: str | None = None) -> tuple[int, ...]:
        """Ids of a conversation that begins with `problem`, up to where the assistant's turn begins. `system`: a system message
        of the problem's own, in the place of the common one. Raises DataError where a text changes what is written around it."""
        if system is None:
            return self._encode(self._filled(self._frame, [PROBLEM], [problem], self._first))
        if not self._proven_with_system:  # the template may look whether there is one
            self._prove_long(("", ""), [{"role": "system", "content": _hole(SYSTEM)}])
            self._proven_with_system = True
        frame = self._split(self._own_first([_hole(SYSTEM), _hole(PROBLEM)]), [SYSTEM, PROBLEM])
        return self._encode(self._filled(frame, [SYSTEM, PROBLEM], [system, problem], self._own_first))

    def results(self, results: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Ids of what follows an assistant's turn after its closing token: (tool, text) of each result, and the beginning of
        the next turn. Raises DataError where a text changes what the template writes around it."""
        names, texts = tuple(name for name, _ in results), [text for _, text in results]
        parts = self._filled(
            self._between(names), range(len(texts)), texts, lambda shown: self._after_turn(names, shown)
        )
        return self._encode(parts)[1:]

    def _begun_thought(self) -> str:
        begin = self._frame[-1].rstrip()
        return next((opened for opened, _ in THOUGHTS if begin.endswith(opened)), "")

    def written_calls(self, calls: Sequence[tuple[str, Mapping[str, Any]]]) -> str | None:
        """The text of an assistant's turn with these calls, as the template writes it; None where it cannot, or leaves them out."""
        made = [{"type": "function", "function": {"name": n, "arguments": dict(a)}} for n, a in calls]
        turn = {"role": "assistant", "content": "", "tool_calls": made}
        start = [*self._head, _user(_hole(PROBLEM))]
        try:
            whole = self._render([*start, turn], generate=False)
            begin = self._render(start)
        except DataError:
            return None
        return whole.removeprefix(begin) if whole.startswith(begin) else None

    def _first(self, shown: Sequence[str]) -> str:
        return self._render([*self._head, _user(shown[0])])

    def _own_first(self, shown: Sequence[str]) -> str:
        return self._render([{"role": "system", "content": shown[0]}, _user(shown[1])])

    def _filled(
        self, pieces: Sequence[str], holes: Sequence[int], texts: Sequence[str], render: Callable[[Sequence[str]], str]
    ) -> list[Part]:
        """The template's pieces with the texts between them as it writes them (some templates trim or quote)."""
        parts: list[Part] = [(pieces[0], True)]
        for n, text in enumerate(texts):
            whole = render([text if k == n else _hole(hole) for k, hole in enumerate(holes)])
            content = _inside(whole, *_around(pieces, holes, n))
            if content is None:
                raise DataError(
                    f"the chat template writes other things around the text {text[:60]!r} than around others"
                )
            parts += [(content, False), (pieces[n + 1], True)]
        return parts

    # ------------------------------------------------------------------------------------------------ rendering

    def _render(self, messages: Sequence[Message], *, generate: bool = True) -> str:
        return self._tokenizer.render_chat(messages, self._tools, generate=generate, arguments=self._arguments)

    def _split(self, text: str, holes: Sequence[int]) -> list[str]:
        """What stands around the place-holders, which are `holes` in this order, each once."""
        found = re.findall(_HOLE, text)
        if [int(number) for number in found] != list(holes):
            raise DataError(
                f"the chat template of {self._tokenizer.path} leaves a message out, repeats one or changes their order: of "
                f"{len(holes)} messages {len(found)} are in its text; take a model whose template keeps them"
            )
        return re.split(_HOLE, text)[::2]

    def _results(self, names: Sequence[str], texts: Sequence[str]) -> list[Message]:
        return [{"role": self._role, "name": name, "content": text} for name, text in zip(names, texts, strict=True)]

    def _after_turn(self, names: Sequence[str], texts: Sequence[str]) -> str:
        """What the template puts between an assistant's turn and the next."""
        turn = _hole(ASSISTANT)
        start = [*self._head, _user(_hole(PROBLEM))]
        begin = self._render(start) + turn
        whole = self._render([*start, _assistant(turn), *self._results(names, texts)])
        if not whole.startswith(begin):
            raise self._broken(len(start), "assistant", f"with a message of the role {self._role} after it")
        return whole[len(begin) :]

    def _render_between(self, names: tuple[str, ...]) -> list[str]:
        return self._split(self._after_turn(names, [_hole(n) for n in range(len(names))]), range(len(names)))

    def _broken(self, at: int, role: str, when: str) -> DataError:
        return DataError(
            f"the chat template of {self._tokenizer.path} is not append-only: {when}, message {at + 1} ({role}) is not written "
            f"as it was sampled, so what is trained would not be what is served; take another template, or a text with {{problem}}"
        )

    # ------------------------------------------------------------------------------------------------ proof

    def _prove(self) -> str:
        """The token that closes an assistant's turn. Raises DataError."""
        self._prove_long(("", ""), self._head)
        for opened, closed in THOUGHTS:
            if closed in self._source:
                self._prove_long((f"{opened}\nso\n{closed}\n\n", ", with thinking in it"), self._head)
        one = self._after_turn(self._names[0], [_hole(0)])
        closing = next((mark for mark in self._marks if one.startswith(mark)), None)
        if closing is None:
            raise DataError(
                f"the chat template of {self._tokenizer.path} closes the assistant's turn with {one[:20]!r}, which is no special "
                f"token; nothing would tell a server that a turn is over"
            )
        self._prove_ids()
        return closing

    def _prove_long(self, thought: tuple[str, str], head: Sequence[Message]) -> None:
        """Three turns that begin with the thought, with one and several results between them. Raises DataError."""
        text, what = thought
        messages: list[Message] = [*head, _user(_hole(PROBLEM))]
        for turn, names in enumerate((self._names[0], self._names[-1], self._names[0])):
            said = text + _hole(ASSISTANT + turn)
            begin = self._render(messages) + said
            at = len(messages)
            messages += [_assistant(said), *self._results(names, [_hole(n) for n in range(len(names))])]
            whole = self._render(messages)
            if not whole.startswith(begin):
                raise self._broken(at, "assistant", f"with message {at + 2} ({self._role}) after it{what}")
            if self._split(whole[len(begin) :], range(len(names))) != self._between(names):
                raise self._broken(at + 1, self._role, f"in turn {turn + 1}{what}")

    def _prove_ids(self) -> None:
        """The ids are the tokenizer's own for what the template wrote. Raises DataError."""
        names, wanted = self._names[-1], self._tokenizer.encode_with_special
        for text in ("Let $x = 12.5$;\n\n  what is\tπ·x²?", "  two", "two \n", "7"):
            texts = [text, "42\n"][: len(names)]
            prompt = wanted(self._first([text]))
            results = wanted(self._after_turn(names, texts))[1:]
            if (self.prompt(text), self.results(list(zip(names, texts, strict=True)))) != (prompt, results):
                raise DataError(
                    f"{self._tokenizer.path}: its tokenizer makes other ids of a whole conversation than of the texts between "
                    f"special tokens (it adds or swallows spaces there); use the model's fast tokenizer (tokenizer.json)"
                )

    # ------------------------------------------------------------------------------------------------ ids

    def _encode(self, parts: Sequence[Part]) -> tuple[int, ...]:
        """Special tokens where the template wrote them; text between two of them is encoded in one piece, whoever wrote it."""
        ids: list[int] = []
        text = ""
        for part, own in parts:
            at = 0
            for match in self._pattern.finditer(part) if own else ():
                ids += self._encode_text(text + part[at : match.start()])
                ids.append(self._tokenizer.added[match.group()])
                text, at = "", match.end()
            text += part[at:]
        return (*ids, *self._encode_text(text))

    def _encode_text(self, text: str) -> list[int]:
        """Text with no token of the template's in it: one that others wrote is cut behind its first character."""
        ids: list[int] = []
        at = 0
        while match := self._pattern.search(text, at):
            ids += self._encode_plain(text[at : match.start() + 1])
            at = match.start() + 1
        return [*ids, *self._encode_plain(text[at:])]

    def _encode_plain(self, text: str) -> tuple[int, ...]:
        ids = self._tokenizer.encode(text) if text else ()
        if self._mark_ids.isdisjoint(ids):
            return ids
        return tuple(i for ch in text for i in self._tokenizer.encode(ch))  # the tokenizer's normalising made one


_HOLE = r"torlhole(\d+)eloh"


def _hole(number: int) -> str:
    """A text that stands for another; letters and digits, so that templates leave it as it is."""
    return f"torlhole{number}eloh"


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _around(pieces: Sequence[str], holes: Sequence[int], n: int) -> tuple[str, str]:
    """What stands before and after place-holder number `n`, the other place-holders included."""
    before = "".join(f"{piece}{_hole(hole)}" for piece, hole in zip(pieces, holes[:n], strict=False)) + pieces[n]
    after = (
        "".join(f"{piece}{_hole(hole)}" for piece, hole in zip(pieces[n + 1 :], holes[n + 1 :], strict=False))
        + pieces[-1]
    )
    return before, after


def _inside(text: str, before: str, after: str) -> str | None:
    """What stands between two texts; None where they are not there."""
    fits = len(text) >= len(before) + len(after) and text.startswith(before) and text.endswith(after)
    return text[len(before) : len(text) - len(after)] if fits else None
