"""DSPy: the programs of its first pages."""

import dspy
from show import ANSWER, BASE_URL, KEY, MODEL, QUESTION, equal, get_weather, show

model = dspy.LM(f"openai/{MODEL}", api_base=BASE_URL, api_key=KEY, cache=False, num_retries=0)
dspy.configure(lm=model)
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def chat() -> None:
    equal(model("Hello"), [ANSWER])


def tools() -> None:
    (reply,) = model(QUESTION, tools=[WEATHER])
    (call,) = reply["tool_calls"]
    equal(call.function.name, "get_weather")
    equal(get_weather("Paris"), "21 degrees")


def structured_output() -> None:
    person = dspy.Predict("text -> name: str, age: int")(text="Ada is 36 years old.")
    equal((person.name, person.age), ("Ada", 36))


def embeddings() -> None:
    vectors = dspy.Embedder(f"openai/{MODEL}", api_base=BASE_URL, api_key=KEY, caching=False)
    equal(vectors(["one", "two words"]).shape, (2, 4))


show(chat=chat, tools=tools, structured_output=structured_output, embeddings=embeddings)
