"""What the Python programs share: where the server is, the words of the conversation, and how features are reported."""

import asyncio
import inspect
import json
import os
import traceback
from collections.abc import Callable
from typing import Any

SERVER = os.environ["QUIRE_URL"]
BASE_URL = f"{SERVER}/v1"
MODEL = "scripted"
KEY = "none"
QUESTION = "What is the weather in Paris?"
RESULT = "21 degrees"
REPORT = "It is 21 degrees in Paris."
ANSWER = "To be, or not to be: that is the question."


def get_weather(city: str) -> str:
    """Get the weather of a city.

    Args:
        city: The city's name.
    """
    assert city == "Paris", city
    return RESULT


def equal(found: object, expected: object) -> None:
    """Raise `AssertionError` unless both are equal."""
    assert found == expected, f"{found!r} instead of {expected!r}"


def show(**features: Callable[[], Any]) -> None:
    """Run each feature's function and append a line of JSON to the results: its name, and its error or null."""
    for name, run in features.items():
        error = None
        try:
            if inspect.iscoroutinefunction(run):
                asyncio.run(run())
            else:
                run()
        except Exception:
            error = traceback.format_exc()
        with open(os.environ["RESULTS"], "a") as results:
            print(json.dumps({"feature": name.replace("_", " "), "error": error}), file=results)
