"""The reward `judge`: a language model behind an OpenAI-compatible endpoint rates each answer."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from fusedrl.engine.base.blame import Invalid, told
from fusedrl.engine.base.errors import RewardError, SetupError, no_such
from fusedrl.engine.rewards.texts import text_of

if TYPE_CHECKING:
    from openai import AsyncOpenAI

RUBRIC = """Please act as an impartial judge and rate the answer that an assistant gave to a user.
Consider whether it is helpful, relevant, accurate and clear; its length alone is worth nothing.
Explain briefly, and then rate it on a scale of 1 to 10 in exactly this form: "[[rating]]", for
example: "Rating: [[5]]".

[The user's question]
{prompt}

[The assistant's answer]
{completion}

[The end of the assistant's answer]"""
_RATING = re.compile(r"\[\[\s*(\d+(?:\.\d+)?)\s*\]\]")
_NO_KEY = "none"
_LOWEST, _HIGHEST = 1.0, 10.0
_GATES: WeakKeyDictionary[
    asyncio.AbstractEventLoop, dict[tuple[str, str, int], asyncio.Semaphore]
] = WeakKeyDictionary()


async def judge(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    model: str,
    base_url: str = "",
    rubric: str = "",
    concurrency: int = 8,
    timeout: float = 60.0,
    retries: int = 3,
    **columns: Any,
) -> list[float | Invalid]:
    """Return a language model's rating of each completion, from 0 (it said 1) to 1 (it said 10).

    The endpoint is asked by the client of the package openai. Of its reply the last [[number]]
    counts. A request that fails or is late is repeated; a completion that gets no rating in the end
    (the reply has none, the endpoint was late or overloaded) is invalid, as by any reward. An
    endpoint that cannot be reached, or refuses the key or the model, stops the run. Prompts and
    completions are sent to that endpoint, and nowhere else.

    Args:
        model: name of the model there.
        base_url: address of the endpoint, such as http://localhost:8000/v1; by default what the
            client takes from OPENAI_BASE_URL, or else OpenAI's. The key is taken from
            OPENAI_API_KEY; a server of one's own mostly needs none.
        rubric: file with the text to send, in which {prompt} and {completion} are filled in; by
            default the single-answer grading of MT-Bench, shortened.
        concurrency: requests at once; in worker processes, of each.
        timeout: seconds of one request, from its beginning to the end of the reply.
        retries: how often a request is repeated, after pauses that double from half a second to
            eight seconds.
    Raises:
        SetupError: the package is missing (pip install 'fusedrl[judge]').
        RewardError: the endpoint cannot be reached or refuses; no such rubric.

    Source: Zheng et al. (2023), "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", figure 6.
    """
    _check_numbers(concurrency, timeout, retries)
    text, gate = _rubric(rubric), _gate(model, base_url, concurrency)
    filled = [
        text.replace("{prompt}", _shown(prompt)).replace("{completion}", text_of(said))
        for prompt, said in zip(prompts, completions, strict=True)
    ]
    async with _client(base_url, timeout, retries) as client:

        async def ask(message: str) -> float | Invalid:
            async with gate:
                return await _rated(client, model, message, timeout, retries)

        asked = [asyncio.ensure_future(ask(message)) for message in filled]
        try:
            return list(await asyncio.gather(*asked))
        finally:
            for one in asked:  # after an error the others are not waited for
                one.cancel()


def check_judge(
    *,
    model: str,
    base_url: str = "",
    rubric: str = "",
    concurrency: int = 8,
    timeout: float = 60.0,
    retries: int = 3,
) -> None:
    """Check the options of `judge` before anything is sent.

    Raises:
        SetupError: the package is missing, or the key where the endpoint is OpenAI's.
        RewardError: a number is out of range, or the rubric is no such file.
    """
    _check_numbers(concurrency, timeout, retries)
    _rubric(rubric)
    client = _client(base_url, timeout, retries)
    if client.api_key == _NO_KEY and client.base_url.host == "api.openai.com":
        raise SetupError(
            f"reward 'judge': no key is set, and without base_url the endpoint is "
            f"{client.base_url}; set OPENAI_API_KEY, or name a server of your own: "
            f"judge:model={model},base_url=http://localhost:8000/v1"
        )


def _check_numbers(concurrency: int, timeout: float, retries: int) -> None:
    if concurrency < 1 or retries < 0 or not timeout > 0:
        raise RewardError(
            "reward 'judge': expected concurrency >= 1, retries >= 0 and timeout > 0, got "
            f"concurrency={concurrency}, retries={retries}, timeout={timeout}"
        )


def _gate(model: str, base_url: str, concurrency: int) -> asyncio.Semaphore:
    """Return what limits the requests at once: one for all calls of an event loop, since worker
    processes call for each completion."""
    gates = _GATES.setdefault(asyncio.get_running_loop(), {})
    return gates.setdefault((model, base_url, concurrency), asyncio.Semaphore(concurrency))


def _rubric(file: str) -> str:
    if not file:
        return RUBRIC
    if not Path(file).is_file():
        raise RewardError(f"reward 'judge': expected rubric to be a file; {no_such(file)}")
    text = Path(file).read_text(encoding="utf-8")
    if "{completion}" not in text:
        raise RewardError(
            f"reward 'judge': expected {{completion}} in the rubric {file}, where the answer is to "
            "stand (and {prompt} for the question)"
        )
    return text


def _shown(prompt: Any) -> str:
    """Return a prompt as a judge reads it; of a conversation each message with its role."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return str(prompt[0].get("content", ""))
    return "\n\n".join(f"{one.get('role')}: {one.get('content')}" for one in prompt)


def _client(base_url: str, timeout: float, retries: int) -> AsyncOpenAI:
    try:
        import openai
    except ImportError as error:
        raise SetupError(
            "reward 'judge' needs the package openai: pip install 'fusedrl[judge]'"
        ) from error
    # prompts and completions go to this endpoint, and not where it sends them on to
    sender = openai.DefaultAsyncHttpxClient(follow_redirects=False, timeout=timeout)
    options: dict[str, Any] = {
        "timeout": timeout,
        "max_retries": retries,
        "http_client": sender,
    }
    if base_url:
        options["base_url"] = base_url
    try:
        return openai.AsyncOpenAI(**options)
    except openai.OpenAIError:  # no key: a server of one's own needs none, OpenAI's says so
        return openai.AsyncOpenAI(**options, api_key=_NO_KEY)


async def _rated(
    client: AsyncOpenAI, model: str, message: str, timeout: float, retries: int
) -> float | Invalid:
    import openai

    where = f"the endpoint {client.base_url}"
    # the client's limit is on each part of a reply, and a reply may trickle
    most = timeout * (retries + 1) + sum(min(8.0, 0.5 * 2**i) for i in range(retries))
    try:
        reply = await asyncio.wait_for(
            client.chat.completions.create(
                model=model, messages=[{"role": "user", "content": message}], temperature=0.0
            ),
            most,
        )
        said = reply.choices[0].message.content or ""
        if not isinstance(said, str):
            raise TypeError(f"expected a text, got {type(said).__name__}")
    except (TimeoutError, openai.APITimeoutError):
        return Invalid(f"{where} did not answer within {timeout:g} s, {retries + 1} times")
    except (openai.RateLimitError, openai.InternalServerError) as error:
        return Invalid(f"{where} answered {error.status_code}, {retries + 1} times")
    except openai.APIConnectionError as error:
        raise RewardError(
            f"reward 'judge': {where} cannot be reached ({told(error.__cause__ or error)}), "
            f"{retries + 1} times; is it running, and is base_url right?"
        ) from error
    except openai.APIStatusError as error:
        raise RewardError(
            f"reward 'judge': {where} refuses: {error.status_code} "
            f"{' '.join(str(error.message).split())[:300]}; check model={model}, base_url, and the "
            "key in OPENAI_API_KEY"
        ) from error
    except (
        AttributeError,
        IndexError,
        TypeError,
        ValueError,
        RecursionError,
        openai.OpenAIError,
    ) as error:
        return Invalid(f"{where} sent no chat completion ({told(error)[:120]})")
    *_, rating = (None, *_RATING.finditer(said))
    value = None if rating is None else float(rating[1])
    if value is None or not _LOWEST <= value <= _HIGHEST:
        return Invalid(f"no [[rating]] from 1 to 10 in the reply of {where}: {said[-120:]!r}")
    return (value - _LOWEST) / (_HIGHEST - _LOWEST)
