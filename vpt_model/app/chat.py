"""What `vpt chat` runs: a conversation in the terminal, with pictures, looks, forks and second thoughts."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from contextlib import suppress

from rich.console import Console
from rich.table import Table
from rich.text import Text

from vpt_model.engine import Chat, Engine
from vpt_model.engine.events import Done, Look, Reencode, Region, Token

HELP = {
    "/image FILE": "show a picture with the next question; a number looks at an earlier one, 0 is the first",
    "/look region x2,y1,x5,y4": "with the next question, look at these cells of the 8x8 grid again",
    "/look clip": "… or encode the picture again (clip, dino or sam, as the model has it)",
    "/undo": "forget the last question and its answer",
    "/fork": "try something else: go on in a second conversation that begins here",
    "/back": "return to the conversation that was forked, and forget the fork",
    "/save FILE, /load FILE": "keep the conversation, and take it up again",
    "/help, /quit": "this list; leave (as Ctrl-D does)",
}


class Session:
    """Reads lines, asks what is no command, and prints the answer as it comes.

    chats: the conversation and its forks, the one that is spoken to last.
    """

    def __init__(self, engine: Engine, console: Console, image: str | None = None, max_new_tokens: int = 256) -> None:
        self.engine, self.console, self.max_new_tokens = engine, console, max_new_tokens
        self.chats = [engine.chat()]
        self.image: str | int | None = image
        self.looks: list[str] = []

    @property
    def chat(self) -> Chat:
        """The conversation that is spoken to."""
        return self.chats[-1]

    def run(self, read: Callable[[str], str]) -> None:
        """Run until `read`, which is given the prompt, raises EOFError, or "/quit". Ctrl-C stops an answer only."""
        with suppress(EOFError):
            while (line := read(self.prompt).strip()) != "/quit":
                try:
                    self.take(line)
                except KeyboardInterrupt:
                    self._say("stopped; the question is forgotten")
                except (ValueError, TypeError, OSError) as error:
                    self.console.print(Text(f"error: {error}", style="red"))
        for chat in self.chats:
            chat.close()

    @property
    def prompt(self) -> str:
        """Which conversation, and how many tokens it holds."""
        return f"{'fork ' * (len(self.chats) - 1)}{self.chat.length} > "

    def take(self, line: str) -> None:
        """Take one line, a command or a question. Raises ValueError for what is no command or cannot be done."""
        if not line:
            return
        if not line.startswith("/"):
            return self._ask(line)
        name, *arguments = shlex.split(line)
        commands = {"/image": self._image, "/look": self._look, "/save": self._save, "/load": self._load}
        plain = {"/undo": self._undo, "/fork": self._fork, "/back": self._back, "/help": self._help}
        if name in plain and not arguments:
            return plain[name]()
        if name in commands and arguments:
            return commands[name](" ".join(arguments))
        raise ValueError(f"{line!r} is no command: /help lists them")

    def _ask(self, question: str) -> None:
        looks, limit = self.looks or None, self.max_new_tokens
        for event in self.chat.stream(question, self.image, looks=looks, max_new_tokens=limit):
            if isinstance(event, Token):
                self.console.print(Text(event.text), end="")
            elif isinstance(event, Region):
                self._say(f"\nlooks at {', '.join(map(str, event.boxes))}")
            elif isinstance(event, Reencode):
                self._say(f"\nlooks again by {event.kind}")
            elif isinstance(event, Look):
                self._say(f"sees {event.tokens} visual tokens")
            elif isinstance(event, Done):
                self.console.print()
                for notice in event.answer.notices:
                    self.console.print(Text(f"note: {notice}", style="yellow"))
        self.image, self.looks = None, []

    def _image(self, name: str) -> None:
        self.image = int(name) if name.isdecimal() else name
        self._say(f"the next question is about {name}")

    def _look(self, spec: str) -> None:
        # As one types it: the kind, then the cells.
        self.looks = [spec.replace("region ", "region:", 1).replace(" ", "")]
        self._say(f"the next question is answered after the look {self.looks[0]}")

    def _undo(self) -> None:
        self.chat.rewind()
        self._say(f"{len(self.chat)} questions are left")

    def _fork(self) -> None:
        self.chats += self.chat.fork()
        self._say("a fork: /back returns")

    def _back(self) -> None:
        if len(self.chats) == 1:
            raise ValueError("this is no fork: /fork makes one")
        self.chats.pop().close()
        self._say(f"back, behind {len(self.chat)} questions")

    def _save(self, file: str) -> None:
        self.chat.save(file)
        self._say(f"saved to {file}")

    def _load(self, file: str) -> None:
        self.chats.append(self.engine.load_chat(file))
        self._say(f"{len(self.chat)} questions from {file}: /back leaves them")

    def _help(self) -> None:
        table = Table(box=None, show_header=False)
        for command, meaning in HELP.items():
            table.add_row(command, meaning)
        self.console.print(table)

    def _say(self, text: str) -> None:
        self.console.print(Text(text, style="dim"))
