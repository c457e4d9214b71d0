"""instructor: its README's program in each mode that has no other provider's name."""

from typing import Any

import instructor
from openai import OpenAI
from pydantic import BaseModel
from show import BASE_URL, KEY, MODEL, equal, show

ADA = [{"role": "user", "content": "Ada is 36 years old."}]


class Person(BaseModel):
    name: str
    age: int


def client(mode: instructor.Mode) -> Any:
    return instructor.from_openai(OpenAI(base_url=BASE_URL, api_key=KEY, max_retries=0), mode=mode)


def structured_output() -> None:
    for mode in (
        instructor.Mode.TOOLS,
        instructor.Mode.TOOLS_STRICT,
        instructor.Mode.JSON,
        instructor.Mode.JSON_SCHEMA,
    ):
        person = client(mode).chat.completions.create(model=MODEL, messages=ADA, response_model=Person, max_retries=0)
        equal((mode, person.name, person.age), (mode, "Ada", 36))


def stream() -> None:
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        *_, last = client(mode).chat.completions.create_partial(model=MODEL, messages=ADA, response_model=Person)
        equal((mode, last.name, last.age), (mode, "Ada", 36))


show(structured_output=structured_output, stream=stream)
