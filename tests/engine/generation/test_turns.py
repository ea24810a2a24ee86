"""Turns in every order in which a few threads can meet at them."""

import itertools
import threading
from types import SimpleNamespace

import pytest
from tests.support.interleavings import explore

from fusedrl.engine.generation import turns as module
from fusedrl.engine.generation.turns import Turns

pytestmark = pytest.mark.cpu_only("threads of the host")


class Forgets(Turns):
    """Hands the turn on, and forgets who has it."""

    def leave(self):
        with self._mutex:
            self._holder = None
            if self._waiting:
                _, gate = self._waiting.popleft()
                gate.release()


class Early(Turns):
    """Lets the next thread go before it has the turn."""

    def leave(self):
        with self._mutex:
            waiting = bool(self._waiting)
            self._holder = None
            gate = self._waiting[0][1] if waiting else None
        if waiting:
            with self._mutex:
                self._holder, _ = self._waiting.popleft()
            gate.release()


def orders(monkeypatch, kinds, made=Turns, within=False, interrupts=False):
    """Explore threads that take turns (`with`) or try to (`try`). Return how many orders there
    were, and all that became of the threads."""
    seen = set()

    def scene(threads):
        first = iter([True])  # the mutex is made first; what follows are gates

        def lock():
            mutex = next(first, False)
            return threads.lock(within, gate=not mutex, interrupts=interrupts and not mutex)

        monkeypatch.setattr(
            module, "threading", SimpleNamespace(Lock=lock, get_ident=threading.get_ident)
        )
        turns, inside, came = made(), [], {}

        def enter(name):
            inside.append(name)
            assert inside == [name], "two threads have the turn"
            threads.pause(None)  # others go on while it has the turn
            assert inside == [name], "two threads have the turn"
            inside.remove(name)

        def waits(name):
            try:
                with turns:
                    enter(name)
                    came[name] = "had"
            except KeyboardInterrupt:
                came[name] = "interrupted"

        def tries(name):
            came[name] = "refused"
            if turns.try_enter():
                enter(name)
                came[name] = "had"
                turns.leave()

        for name, kind in enumerate(kinds):
            work = {"with": waits, "try": tries}[kind]
            threads.start(lambda work=work, name=name: work(name))

        def check():
            assert turns._holder is None
            assert not turns._waiting
            seen.add(tuple(came[name] for name in range(len(kinds))))

        return check

    return explore(scene), seen


@pytest.mark.parametrize("kinds, runs", [(3, 84), pytest.param(4, 1944, marks=pytest.mark.full)])
def test_threads_that_wait_all_get_their_turn(monkeypatch, kinds, runs):
    assert orders(monkeypatch, ["with"] * kinds) == (runs, {("had",) * kinds})


def test_one_that_tries_is_refused_or_has_it_alone(monkeypatch):
    """It may come while another looks at who has the turn."""
    runs, seen = orders(monkeypatch, ["with", "with", "try"], within=True)
    assert (runs, seen) == (226, {("had", "had", "had"), ("had", "had", "refused")})


@pytest.mark.parametrize("kinds, runs", [(2, 24), pytest.param(3, 3078, marks=pytest.mark.full)])
def test_an_interrupt_at_any_wait_loses_nobodys_turn(monkeypatch, kinds, runs):
    found, seen = orders(monkeypatch, ["with"] * kinds, interrupts=True)
    assert found == runs
    outcomes = set(itertools.product(("had", "interrupted"), repeat=kinds))
    assert seen == outcomes - {("interrupted",) * kinds}  # one comes first, and never waits


@pytest.mark.parametrize("made", [Forgets, Early])
def test_planted_mistakes_are_found(monkeypatch, made):
    with pytest.raises(AssertionError, match="two threads have the turn"):
        orders(monkeypatch, ["with"] * 3, made)
