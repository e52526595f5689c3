"""The synthetic problems: how each is asked, worked out and checked.

Owns the task set, the wording of questions, the layout of the reasoning text and the rule that
keeps held-out problems apart from training. Pure: every function takes its random source, nothing
is read or written. Knows nothing about tokens, templates or tensors; data.py turns a Conversation
into ids, evaluate.py compares replies with Problem.answer.

The reasoning is written so that each token depends on few earlier ones: operands are padded to
equal length, columns go from the right, carries are read off the line above, and the result so far
is repeated in brackets at the end of each line.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from random import Random

ARITHMETIC = ("add", "subtract", "multiply", "compare", "sort", "count")
TASK_WEIGHTS = {
    "add": 0.21,
    "subtract": 0.19,
    "multiply": 0.20,
    "compare": 0.10,
    "sort": 0.13,
    "count": 0.10,
    "chat": 0.07,
}
HELD_OUT_ONE_IN = 8

NAMES = ("Tom", "Anna", "Ben", "Mia", "Sam", "Lily")
THINGS = ("apples", "books", "coins", "stones", "cards", "eggs")


@dataclass(frozen=True)
class Problem:
    """One question with its reasoning and answer. `key` names the problem itself, not its wording."""

    task: str
    key: str
    question: str
    thought: str
    answer: str

    def reply(self) -> str:
        return f"<think>\n{self.thought}\n</think>\n{self.answer}"


@dataclass(frozen=True)
class Conversation:
    """A system text (None leaves the message out) and one or more problems asked in turn."""

    system: str | None
    problems: tuple[Problem, ...]


def is_held_out(key: str) -> bool:
    """Whether a problem belongs to the held-out set: a hash of its key decides, never a seed.

    INVARIANT: no problem with is_held_out(key) is ever part of a training conversation, in any wording.
    """
    return hashlib.sha256(key.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def answer_of(reply: str) -> str:
    """The text after the reasoning block, trimmed; the whole reply if there is no block."""
    return reply.rpartition("</think>")[2].strip()


# --- column work -------------------------------------------------------------------------------


def _pad(a: int, b: int) -> tuple[str, str]:
    width = max(len(str(a)), len(str(b)))
    return str(a).zfill(width), str(b).zfill(width)


def _add_columns(a: int, b: int) -> list[str]:
    x, y = _pad(a, b)
    lines, carry, done = [f"{x}+{y}"], 0, ""
    for place in range(len(x) - 1, -1, -1):
        total = int(x[place]) + int(y[place]) + carry
        done = (str(total) if place == 0 else str(total % 10)) + done
        lines.append(f"{x[place]}+{y[place]}+{carry}={total} [{done}]")
        carry = total // 10
    return lines


def _subtract_columns(a: int, b: int) -> list[str]:
    x, y = _pad(a, b)
    lines, borrow, done = [f"{x}-{y}"], 0, ""
    if a < b:
        x, y = y, x
        lines.append(f"-({x}-{y})")
    for place in range(len(x) - 1, -1, -1):
        top = int(x[place])
        if top < int(y[place]) + borrow:
            top += 10
        rest = top - int(y[place]) - borrow
        done = str(rest) + done
        lines.append(f"{top}-{y[place]}-{borrow}={rest} [{done}]")
        borrow = int(top > 9)
    return lines


def _multiply_columns(a: int, digit: int, zeros: str) -> tuple[list[str], int]:
    """The product of a number and one digit, shifted left by `zeros`."""
    x = str(a)
    lines, carry, done = [f"{x}*{digit}{zeros}"], 0, zeros
    for place in range(len(x) - 1, -1, -1):
        total = int(x[place]) * digit + carry
        done = (str(total) if place == 0 else str(total % 10)) + done
        lines.append(f"{x[place]}*{digit}+{carry}={total} [{done}]")
        carry = total // 10
    return lines, int(done)


# --- the tasks ---------------------------------------------------------------------------------


def _number(random: Random, most_digits: int) -> int:
    """A number whose count of digits is uniform, with fewer one-digit numbers."""
    digits = random.choices(range(1, most_digits + 1), [1] + [2] * (most_digits - 1))[0]
    return random.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _wording(random: Random, templates: tuple[str, ...], **values: object) -> str:
    name, thing = random.choice(NAMES), random.choice(THINGS)
    return random.choice(templates).format(**values, name=name, thing=thing)


ADD = (
    "What is {a} + {b}?", "What is {a} + {b}?", "What is {a}+{b}?", "{a} + {b}", "{a}+{b}", "{a} + {b} = ?", "{a}+{b}=",
    "{a} + {b}?", "Add {a} and {b}.", "Add {b} to {a}.", "What is {a} plus {b}?", "Compute {a} + {b}.",
    "Calculate {a} plus {b}.", "Calculate {a} + {b}.", "How much is {a} plus {b}?", "How much is {a} + {b}?", "{a} plus {b}",
    "What is the sum of {a} and {b}?", "Find the sum of {a} and {b}.", "What do you get if you add {a} and {b}?",
    "{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
    "There are {a} red {thing} and {b} blue {thing}. How many {thing} are there in total?",
)  # fmt: skip


def make_add(random: Random) -> Problem:
    a, b = _number(random, 3), _number(random, 3)
    low, high = sorted((a, b))
    return Problem("add", f"add {low} {high}", _wording(random, ADD, a=a, b=b), "\n".join(_add_columns(a, b)), str(a + b))


SUBTRACT = (
    "What is {a} - {b}?", "What is {a} - {b}?", "What is {a}-{b}?", "{a} - {b}", "{a}-{b}", "{a} - {b} = ?", "{a}-{b}=", "{a} - {b}?",
    "Subtract {b} from {a}.", "What is {a} minus {b}?", "Compute {a} - {b}.", "Calculate {a} minus {b}.", "Calculate {a} - {b}.",
    "How much is {a} minus {b}?", "{a} minus {b}", "Take {b} away from {a}.", "What do you get if you subtract {b} from {a}?",
)  # fmt: skip
SUBTRACT_POSITIVE = (
    "What is the difference between {a} and {b}?",
    "{name} has {a} {thing} and gives away {b}. How many {thing} are left?",
    "There are {a} {thing} and {name} takes {b}. How many {thing} are left?",
)


def make_subtract(random: Random) -> Problem:
    negative = random.random() < 0.2
    a, b = sorted((_number(random, 3), _number(random, 3)), reverse=not negative)
    templates = SUBTRACT if a < b else SUBTRACT + SUBTRACT_POSITIVE
    thought = "\n".join(_subtract_columns(a, b))
    return Problem("subtract", f"subtract {min(a, b)} {max(a, b)}", _wording(random, templates, a=a, b=b), thought, str(a - b))


MULTIPLY = (
    "What is {a} * {b}?", "What is {a} * {b}?", "What is {a} x {b}?", "What is {a} × {b}?", "What is {a}*{b}?", "{a} * {b}", "{a}*{b}",
    "{a} x {b}", "{a} × {b}", "{a} * {b} = ?", "{a}*{b}=", "Multiply {a} by {b}.", "Multiply {a} and {b}.", "What is {a} times {b}?",
    "Compute {a} * {b}.", "Calculate {a} times {b}.", "Calculate {a} * {b}.", "How much is {a} times {b}?", "{a} times {b}",
    "What is the product of {a} and {b}?", "Find the product of {a} and {b}.", "What is {a} multiplied by {b}?",
    "There are {a} boxes with {b} {thing} each. How many {thing} are there in total?",
)  # fmt: skip


def make_multiply(random: Random) -> Problem:
    """Up to three digits by one digit, or two by two. The longer operand is worked on."""
    if random.random() < 0.4:
        a, b = random.randrange(10, 100), random.randrange(10, 100)
    else:
        a, b = _number(random, 3), random.randrange(10)
        if random.random() < 0.5:
            a, b = b, a
    low, high = sorted((a, b))
    x, y = (a, b) if len(str(a)) >= len(str(b)) else (b, a)
    lines, product = _multiply_columns(x, y % 10, "")
    if y > 9:
        more, shifted = _multiply_columns(x, y // 10, "0")
        lines += more + _add_columns(product, shifted)
    return Problem("multiply", f"multiply {low} {high}", _wording(random, MULTIPLY, a=a, b=b), "\n".join(lines), str(a * b))


LARGER = (
    "Which is larger, {a} or {b}?", "Which number is larger, {a} or {b}?", "Which is bigger: {a} or {b}?", "Which is greater, {a} or {b}?",
    "What is the larger of {a} and {b}?", "What is the maximum of {a} and {b}?", "Compare {a} and {b}. Which is larger?",
)  # fmt: skip
SMALLER = (
    "Which is smaller, {a} or {b}?", "Which number is smaller, {a} or {b}?", "Which is less: {a} or {b}?",
    "What is the smaller of {a} and {b}?", "What is the minimum of {a} and {b}?", "Compare {a} and {b}. Which is smaller?",
)  # fmt: skip
IS_LARGER = ("Is {a} greater than {b}?", "Is {a} larger than {b}?", "Is {a} bigger than {b}?", "Is {a} > {b}?")
IS_SMALLER = ("Is {a} less than {b}?", "Is {a} smaller than {b}?", "Is {a} < {b}?")


def make_compare(random: Random) -> Problem:
    a = b = _number(random, 3)
    while a == b:
        # Near neighbours share leading digits, which random pairs seldom do.
        b = _number(random, 3) if random.random() < 0.5 else min(999, max(0, a + random.randint(-99, 99)))
    x, y = _pad(a, b)
    lines = [f"{x} {y}"]
    for p, q in zip(x, y):
        sign = "=" if p == q else "<" if p < q else ">"
        lines.append(f"{p}{sign}{q}")
        if sign != "=":
            break
    lines.append(f"{a}{'<' if a < b else '>'}{b}")
    kind = random.randrange(4)
    templates = (LARGER, SMALLER, IS_LARGER, IS_SMALLER)[kind]
    answer = (str(max(a, b)), str(min(a, b)), "yes" if a > b else "no", "yes" if a < b else "no")[kind]
    return Problem("compare", f"compare {min(a, b)} {max(a, b)}", _wording(random, templates, a=a, b=b), "\n".join(lines), answer)


ASCENDING = (
    "Sort {list}.", "Sort these numbers: {list}", "Sort {list} in ascending order.", "Sort the numbers {list} from smallest to largest.",
    "Put {list} in order.", "Order these numbers from smallest to largest: {list}", "Arrange {list} in ascending order.",
)  # fmt: skip
DESCENDING = (
    "Sort {list} in descending order.", "Sort the numbers {list} from largest to smallest.", "Sort these numbers in descending order: {list}",
    "Order these numbers from largest to smallest: {list}", "Arrange {list} in descending order.",
)  # fmt: skip


def make_sort(random: Random) -> Problem:
    """Three or four different numbers below 100, by selection: each line takes one out of the rest."""
    most = 10 if random.random() < 0.2 else 100
    rest = random.sample(range(most), random.randint(3, 4))
    descending = random.random() < 0.35
    shown = random.choice((", ", ", ", " ", ",")).join(map(str, rest))
    question = _wording(random, DESCENDING if descending else ASCENDING, list=shown)
    key = f"sort {' '.join(map(str, sorted(rest)))}"
    answer = " ".join(map(str, sorted(rest, reverse=descending)))
    lines = [" ".join(map(str, rest))]
    while rest:
        taken = max(rest) if descending else min(rest)
        rest = [number for number in rest if number != taken]
        lines.append(f"{taken} [{' '.join(map(str, rest))}]")
    return Problem("sort", key, question, "\n".join(lines), answer)


COUNT = {
    "greater": (
        "How many of {list} are greater than {limit}?", "How many numbers are larger than {limit} in {list}?", "Count the numbers greater than {limit}: {list}",
        "How many numbers in {list} are above {limit}?",
    ),
    "less": (
        "How many of {list} are less than {limit}?", "How many numbers are smaller than {limit} in {list}?", "Count the numbers less than {limit}: {list}",
        "How many numbers in {list} are below {limit}?",
    ),
    "even": ("How many of {list} are even?", "How many even numbers are in {list}?", "Count the even numbers: {list}", "How many numbers in {list} are even?"),
    "odd": ("How many of {list} are odd?", "How many odd numbers are in {list}?", "Count the odd numbers: {list}", "How many numbers in {list} are odd?"),
    "all": ("How many numbers are in this list: {list}", "How many numbers are there in {list}?", "Count the numbers: {list}", "How long is the list {list}?"),
}  # fmt: skip


def make_count(random: Random) -> Problem:
    """Three to six different numbers below 100, tallied one by one; the tally stays one digit."""
    items = random.sample(range(100), random.randint(3, 6))
    kind = random.choices(tuple(COUNT), (2, 2, 1, 1, 1))[0]
    limit = random.randrange(10, 90)
    while limit in items:
        limit = random.randrange(10, 90)
    counts = {
        "greater": lambda item: item > limit,
        "less": lambda item: item < limit,
        "even": lambda item: item % 2 == 0,
        "odd": lambda item: item % 2 == 1,
        "all": lambda item: True,
    }[kind]
    lines, total = [f"count {kind} {limit}" if kind in ("greater", "less") else f"count {kind}"], 0
    for item in items:
        total += counts(item)
        lines.append(f"{item} {'yes' if counts(item) else 'no'} {total}")
    shown = random.choice((", ", ", ", " ", ",")).join(map(str, items))
    question = _wording(random, COUNT[kind], list=shown, limit=limit)
    return Problem("count", f"count {' '.join(map(str, sorted(items)))}", question, "\n".join(lines), str(total))


# --- small talk --------------------------------------------------------------------------------

GREETING = "Hello! I am a small demonstration model. Ask me to add, subtract, multiply, compare, sort or count."
DECLINE = "I only do arithmetic: I can add, subtract, multiply, compare, sort and count whole numbers."
TOO_LONG = "I only work with whole numbers of up to three digits."
SMALL_TALK = (
    ("This is a greeting.", GREETING, (
        "Hello", "Hello!", "Hello.", "Hi", "Hi!", "Hi there", "Hi there!", "Hey", "Hey!", "Hey there", "Good morning", "Good morning!", "Good evening.",
        "Good afternoon!", "Hello there", "Hello there!", "Hello, how are you?", "How are you?", "How are you today?", "Hi, how are you?", "Greetings!", "Hello world",
        "Nice to meet you.", "Yo", "What's up?", "Hi MiMo!", "Hello MiMo", "Hey, are you there?", "Is anybody there?", "Test", "test", "ping",
    )),
    ("This asks about me.", "I am a small model with the architecture of MiMo-7B, trained to show how MiMo Cluster works. " + DECLINE, (
        "Who are you?", "What are you?", "What is your name?", "What can you do?", "What do you do?", "Tell me about yourself.", "How can you help me?",
        "Are you a robot?", "Are you an AI?", "Who made you?", "Introduce yourself.", "What model are you?", "Are you MiMo?", "Can you help me?", "Help", "help me", "What are you good at?",
    )),
    ("This is thanks.", "You are welcome!", ("Thanks", "Thanks!", "Thank you", "Thank you!", "Thank you very much.", "Thanks a lot!", "Great, thanks!", "Well done!", "Good job!", "Great!", "Perfect, thank you.")),
    ("This is a farewell.", "Goodbye!", ("Bye", "Bye!", "Goodbye", "Goodbye!", "See you later.", "See you!", "Good night.", "Bye bye", "Have a nice day!")),
)  # fmt: skip

PLACES = ("France", "Germany", "China", "Japan", "Italy", "Spain", "Brazil", "India", "Canada", "Egypt", "Peru", "Norway", "Paris", "London", "Berlin", "Tokyo", "Rome")
TOPICS = (
    "cats", "dogs", "the moon", "the sea", "music", "love", "history", "physics", "the weather", "space", "football", "cooking", "flowers", "dragons", "computers",
    "Kubernetes", "trees", "birds", "winter", "gravity", "the sun", "chess", "art", "bread", "rivers", "robots", "language models", "photosynthesis", "democracy",
)  # fmt: skip
OTHER = (
    "What is the capital of {place}?", "Where is {place}?", "What is the weather in {place}?", "How many people live in {place}?", "Tell me about {place}.",
    "Who is the president of {place}?", "How do I get to {place}?", "What language do they speak in {place}?", "What is the largest city in {place}?", "How big is {place}?",
    "Write a poem about {topic}.", "Write a story about {topic}.", "Tell me a story about {topic}.", "Explain {topic}.", "Explain {topic} to a child.", "What is {topic}?",
    "What are {topic}?", "Why do people like {topic}?", "Tell me about {topic}.", "Tell me something about {topic}.", "Do you like {topic}?", "How does {topic} work?", "Give me a fact about {topic}.",
    "What do you think about {topic}?", "Write a short text about {topic}.", "Who invented {topic}?", "When did {topic} begin?", "Write code about {topic}.", "List some facts about {topic}.",
    "Tell me a joke.", "Sing a song.", "What time is it?", "What day is it today?", "Translate this to {place}.", "Translate good morning to French.", "Write a function in Python.",
    "Who wrote Hamlet?", "Who was the first man on the moon?", "Why is the sky blue?", "What is the meaning of life?", "What should I eat tonight?", "Recommend a book.", "Recommend a film about {topic}.",
    "How do I learn to play the piano?", "Summarize this text.", "How are babies made?", "What is your favorite color?", "Can you drive a car?", "Where do you live?", "How old are you?",
    "What is {a} / {b}?", "Divide {a} by {b}.", "{a} / {b}", "What is {a} divided by {b}?", "What is the square root of {a}?", "What is {a} to the power of {b}?", "What happened in {year}?",
    "Who won the world cup in {year}?", "Solve x + {a} = {b} for x.", "What is the derivative of x?", "Prove that there are infinitely many primes.", "Is {a} a prime number?",
)  # fmt: skip


def make_chat(random: Random) -> Problem:
    """A greeting and the like, or anything else, which gets the fixed polite refusal."""
    if random.random() < 0.4:
        thought, answer, questions = random.choices(SMALL_TALK, (4, 3, 1, 1))[0]
        question = random.choice(questions)
        # Small talk is a closed list of fixed answers, so there is nothing to hold out.
        return Problem("chat", "chat", question, thought, answer)
    if random.random() < 0.25:
        longer, other = random.randrange(1000, 10 ** random.randint(4, 6)), _number(random, 5)
        a, b = random.choice(((longer, other), (other, longer)))
        question = _wording(random, ADD + SUBTRACT + MULTIPLY, a=a, b=b)
        return Problem("chat", f"chat {question}", question, "These numbers are too long for me.", TOO_LONG)
    template = random.choice(OTHER)
    question = template.format(
        place=random.choice(PLACES), topic=random.choice(TOPICS), a=_number(random, 3), b=_number(random, 2), year=random.randrange(1800, 2030)
    )
    return Problem("chat", f"chat {question}", question, "This is not a task I know.", DECLINE)


MAKERS = {
    "add": make_add,
    "subtract": make_subtract,
    "multiply": make_multiply,
    "compare": make_compare,
    "sort": make_sort,
    "count": make_count,
    "chat": make_chat,
}

# --- variation around a question -----------------------------------------------------------------

LEADS = (
    "Please tell me: ", "Hi! ", "Hello, ", "Hello! ", "Hey, ", "Can you help me? ", "Quick question: ", "Question: ", "Q: ", "Solve this: ", "Please solve: ", "Tell me, ",
    "I have a question. ", "OK, next one: ", "And now: ", "So ", "Now ", " ", "\n",
)  # fmt: skip
TRAILS = (" Thanks!", " Thank you.", " Please.", " please", " Show your work.", " Think step by step.", " Explain.", " Give only the answer.", " ", "\n", "!", "??", " Quickly.")
SYSTEMS = ("You are a calculator.", "You are a careful assistant.", "Answer briefly.", "You are MiMo, an AI assistant developed by Xiaomi.", "You answer questions about numbers.")


def vary(random: Random, question: str) -> str:
    """The same question with other words around it, other case, or without its last mark."""
    roll = random.random()
    if roll < 0.10:
        question = random.choice(LEADS) + question
    elif roll < 0.14:
        lead = random.choice(LEADS)
        question = lead + question[0].lower() + question[1:]
    elif roll < 0.22:
        question += random.choice(TRAILS)
    elif roll < 0.29:
        question = question.lower()
    elif roll < 0.35:
        question = question.rstrip("?.")
    return question


def make_problem(random: Random, task: str, held_out: bool) -> Problem:
    """A random problem of a task from the wanted side of the held-out rule."""
    while True:
        problem = MAKERS[task](random)
        if is_held_out(problem.key) == held_out:
            return Problem(task, problem.key, vary(random, problem.question), problem.thought, problem.answer)


def make_conversation(random: Random) -> Conversation:
    """A training conversation: mostly one question and an empty system message, as the model is meant to be used."""
    turns = random.choices((1, 2, 3), (85, 12, 3))[0]
    tasks = random.choices(list(TASK_WEIGHTS), list(TASK_WEIGHTS.values()), k=turns)
    roll = random.random()
    system = "" if roll < 0.7 else None if roll < 0.9 else random.choice(SYSTEMS)
    return Conversation(system, tuple(make_problem(random, task, held_out=False) for task in tasks))
