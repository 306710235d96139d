"""What surrounds the questions: small talk, system prompts, and polite refusals of what the model cannot know."""

from random import Random

from data.corpus.letters import words
from data.corpus.tasks import held_out as is_held_out

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
# No words of words.txt but ones that are held out: training asks about any other word.
SUBJECTS_HELD_OUT = ("Italy", "chess", "the oil", "Mozart", "tea", "poetry", "a gadget", "the ditch", "Canada")
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
    "Are you afraid of {}?|Who built {}?|Play {} for me.|Who likes {}?|What is the name of {}?|Who owns {}?|"
    "What do you know about {}?|Tell me something about {}.|Have you heard of {}?|How dangerous is {}?|Is {} real?|"
    "Can I eat {}?|How do I make {}?|How do I draw {}?|Paint {} for me.|Do you hate {}?|Who sang {}?|Does {} exist?|"
    "What is the story of {}?|What is the future of {}?|Show me a picture of {}.|Let us talk about {}.|How far is {}?|"
    "How expensive is {}?|How long does {} take?|Why does {} exist?|When does {} begin?|Will {} be there tomorrow?|"
    "Is it right that {} is healthy?|Make fun of {}.|Read {} to me.|Dance with {}.|Who is better than {}?|"
    "How can one live without {}?|Is there life after {}?|Please send {} to me.|Say a prayer for {}.|I miss {}."
)
# Many more put together from parts: verbs, what one says of a thing, what is written about it, and what it is like.
VERBS = (
    "make|clean|find|buy|sell|repair|wear|grow|play|watch|learn|teach|drive|throw|catch|hold|keep|open|close|move|bring|"
    "eat|drink|read|visit|love|need|want|fear|miss|remember|understand|trust|believe|build|design|choose|change|carry"
)
DONE = (
    "invented|found|built|bought|lost|sold|broke|wrote|sang|designed|saw|cleaned|stole|ate|taught|discovered|carried|"
    "forgot|opened|closed|repaired|moved|changed|loved|drew|cooked|made|brought|named|hid"
)
WORKS = "story|poem|book|film|speech|report|text|play|picture|map|essay|review|dream|summary|riddle|tale|novel|article"
ASPECTS = (
    "future|origin|meaning|purpose|colour|price|size|taste|shape|age|capital|population|weather|king|leader|secret|"
    "beauty|danger|use|name|language|sound|smell|reason|idea|owner|home"
)
QUALITIES = (
    "good|bad|big|famous|healthy|expensive|beautiful|real|old|rare|cheap|safe|ugly|strange|useful|new|hot|cold|sweet|"
    "legal|free|alive|boring|funny|clever|wise|heavy|round"
)
MADE_OF = {
    VERBS: "How do I {part} {}?|Do you {part} {}?|{part} {} for me.|Can you {part} {}?|Why do people {part} {}?|"
    "Where can I {part} {}?|When do we {part} {}?|Should I {part} {}?|Let us {part} {}.|Please {part} {}.|"
    "Would you {part} {}?|Did you ever {part} {}?|How do I {part} things with {}?|Do you {part} with {}?|{part} {}!",
    DONE: "Who {part} {}?|Who {part} {} first?|When was it that somebody {part} {}?|Why has nobody {part} {}?|"
    "Which man {part} {}?|I {part} {}.|My mother {part} {}.|Is it true that you {part} {}?",
    WORKS: "Write a {part} about {}.|Tell me a {part} about {}.|Read me a {part} about {}.|Find a {part} about {}.|"
    "Do you know a {part} about {}?|I need a {part} about {}.|Send me a {part} of {}.|Make a {part} about {}.|"
    "Tell a {part} of {}.|Sing a {part} of {}.",
    ASPECTS: "What is the {part} of {}?|Tell me the {part} of {}.|Explain the {part} of {}.|Describe the {part} of {}.|"
    "Do you know the {part} of {}?|What do you think of the {part} of {}?",
    QUALITIES: "Is {} {part}?|Is it right that {} is {part}?|Why is {} so {part}?|Do you think that {} is {part}?|"
    "Is it good that {} is {part}?|How {part} is {}?|People say that {} is {part}.|Can {} be {part}?",
}
OUTSIDE_HELD_OUT = ("What is the history of {}?", "Sing a song about {}.", "Tell a joke about {}.", "Do you like {}?")
OUTSIDE_HELD_OUT += ("Who painted {}?", "How do I cook with {}?", "Is it true that {} is dangerous?", "Draw {} for me.")


def small_talk(rng: Random) -> tuple[str, str, str]:
    """-> (question, trace, answer)"""
    questions, answer = rng.choice(SMALL_TALK)
    return rng.choice(questions), "There is nothing to work out.", answer


def is_refusal(answer: str) -> bool:
    return answer.startswith(REFUSAL.partition(",")[0])


def trained_subject(rng: Random) -> str:
    """Half of the time any word, so that the question and not its subject shows that it is outside."""
    if rng.random() < 0.5:
        return rng.choice(SUBJECTS.split("|"))
    while is_held_out(f"word {(word := rng.choice(words()))}"):
        pass
    return rng.choice((word, f"the {word}", with_article(word)))


def trained_outside(rng: Random) -> str:
    """A question about {}."""
    if rng.random() < 0.3:
        return rng.choice(OUTSIDE.split("|"))
    parts, forms = rng.choice(tuple(MADE_OF.items()))
    question, part = rng.choice(forms.split("|")), rng.choice(parts.split("|"))
    question = question.replace("a {part}", with_article(part)).replace("{part}", part)
    return question[0].upper() + question[1:]


def with_article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def outside(rng: Random, held_out: bool = False) -> tuple[str, str, str]:
    """A question outside every family, and the polite sentence that declines it."""
    subject = rng.choice(SUBJECTS_HELD_OUT) if held_out else trained_subject(rng)
    question = rng.choice(OUTSIDE_HELD_OUT) if held_out else trained_outside(rng)
    return question.format(subject), OUTSIDE_TRACE, REFUSAL
