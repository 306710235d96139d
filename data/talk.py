"""What surrounds the questions: small talk, system prompts, and polite refusals of what the model cannot know."""

from random import Random

from data.tasks import pick

SYSTEM = (
    "You are a helpful assistant.",
    "You are nanoqwen, a tiny model that thinks.",
    "Answer the question.",
    "You are a careful calculator.",
    "Be brief and polite.",
    "You are a friendly teacher.",
    "Think step by step.",
    "You help with numbers, words and dates.",
)
SYSTEM_HELD_OUT = ("You are an assistant for school children.", "Answer shortly and correctly.")

SKILLS = "I can add, subtract, multiply, compare and sort numbers, count and reverse letters, and count days."
SMALL_TALK = (
    (
        ("Hi", "Hello", "Hey", "Hello!", "Hi there!", "Good morning!", "Good evening"),
        "Hello! What can I work out for you?",
    ),
    (
        ("Who are you?", "What are you?", "What is your name?", "Introduce yourself.", "Are you a robot?"),
        "I am nanoqwen, a tiny language model that thinks before it answers.",
    ),
    (("What can you do?", "Help", "How can you help me?", "What are you good at?", "What do you know?"), SKILLS),
    (("Thanks", "Thank you!", "Great, thanks.", "Thank you very much", "Well done!"), "You are welcome!"),
    (("Bye", "Goodbye!", "See you", "Good night"), "Goodbye!"),
    (("How are you?", "How do you do?", "Are you well?"), "I am well, thank you. What can I work out for you?"),
    (
        ("Who made you?", "Where do you come from?", "How were you trained?"),
        "I was trained from random numbers by nanoqwen.",
    ),
)

OUTSIDE_TRACE = "This is not about numbers, letters or days."
REFUSAL = "I am sorry, I do not know that. " + SKILLS
SUBJECTS = (
    "France|Japan|Brazil|the moon|music|love|football|the weather|history|cooking|a cat|a computer|the sea|"
    "Einstein|Shakespeare|gravity|bread|politics|money|cars|dreams|art|Russia|Egypt|the king|a horse|my friend|"
    "the sky|an apple|the brain|war|peace|London|Paris|dinosaurs|planes|trees|snow|coffee|movies|the law|God|"
    "school|a river|fire|gold|the president|my mother|robots|space|Napoleon|Africa|fish|wine|dancing|tennis|"
    "the heart|light|a good book"
)
SUBJECTS_HELD_OUT = ("Italy", "chess", "the sun", "Mozart", "tea", "poetry", "a dog", "the internet", "Canada")
OUTSIDE = (
    "What is the capital of {}?|Tell me a story about {}.|Write a poem about {}.|Who invented {}?|"
    "Explain {} to me.|What do you think of {}?|Translate {} into German.|Why is {} so famous?|"
    "Give me a recipe with {}.|What is {}?|Who is the king of {}?|Is {} good or bad?|Where can I find {}?|"
    "Recommend a book about {}.|Tell me about {}.|Who was the first to see {}?|What colour is {}?|"
    "Write a short text about {}.|How does {} work?|Where is {}?|What does {} mean?|Why do people like {}?|"
    "Summarise what is known about {}.|How old is {}?|Who wrote about {}?|What is the best thing about {}?|"
    "Can you write a program about {}?|Give me advice on {}.|I want to learn about {}.|What happened to {}?|"
    "Do you know {}?|Describe {}.|When was {} discovered?|How can I get {}?|What is {} made of?|"
    "Which is nicer, {} or the rain?|Should I buy {}?|Name a song about {}.|Do you want {}?|Have you ever seen {}?|"
    "Are you afraid of {}?|Who built {}?|Play {} for me.|Who likes {}?|What is the name of {}?|Who owns {}?"
)
OUTSIDE_HELD_OUT = ("What is the history of {}?", "Sing a song about {}.", "Tell a joke about {}.", "Do you like {}?")
OUTSIDE_HELD_OUT += ("Who painted {}?", "How do I cook with {}?", "Is it true that {} is dangerous?", "Draw {} for me.")


def small_talk(rng: Random) -> tuple[str, str, str]:
    """-> (question, trace, answer)"""
    questions, answer = rng.choice(SMALL_TALK)
    return rng.choice(questions), "There is nothing to work out.", answer


def is_refusal(answer: str) -> bool:
    return answer.startswith(REFUSAL.partition(",")[0])


def outside(rng: Random, held_out: bool = False) -> tuple[str, str, str]:
    """A question outside every family, and the polite sentence that declines it."""
    subject = pick(rng, SUBJECTS.split("|"), SUBJECTS_HELD_OUT, held_out)
    question = pick(rng, OUTSIDE.split("|"), OUTSIDE_HELD_OUT, held_out).format(subject)
    return question, OUTSIDE_TRACE, REFUSAL
