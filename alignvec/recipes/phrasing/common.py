"""Frames that every domain shares.

`{asp}` is an aspect ("the usual dose of metformin"), `{q}` a question, `{intro}` a persona's clause.
Openers and closers serve all three levels alike, so that none of them gives the level away.
"""

# Query frames in which the question or the aspect names the topic.
DIRECT_QUERIES = (
    "{intro}. {q}?",
    "{q}? {intro}.",
    "{intro} and want to understand {asp}.",
    "Could you explain {asp}? {intro}.",
    "{intro}. Tell me about {asp}, please.",
    "{intro}, so could you go over {asp}?",
    "Please help me with {asp}. {intro}.",
    "Hello, {q}? {intro} and would like to know.",
    "{intro} and I am curious: {q}?",
    "I have a question about {asp}. {intro}.",
)

# Query frames that name the topic themselves; the question then says "it".
TOPIC_QUERIES = (
    "{intro}, and {t} came up again. {q}?",
    "Somebody mentioned {t} today. {q}? {intro}.",
    "{intro} and a friend asked me about {t}: {q}?",
    "My question is about {t}: {q}? {intro}.",
    "{intro} and keep hearing of {t}. {q}?",
    "I read about {t} and wondered, {q}? {intro}.",
)

# Openers that run on into the sentence.
RUN_ON_OPENERS = (
    "in short, ",
    "briefly, ",
    "well, ",
    "to put it plainly, ",
    "since you ask, ",
    "as it happens, ",
    "for what it is worth, ",
    "good question: ",
    "as far as I can say, ",
)

# Openers that are sentences.
FULL_OPENERS = (
    "Thanks for asking. ",
    "Good question. ",
    "That comes up a lot. ",
    "Let me be plain. ",
    "You ask about {asp}. ",
    "So this is about {asp}. ",
    "It is fair to ask. ",
)

# Openers for a query in which the persona says who they are.
CLOSERS = (
    "{pro} can tell you more",
    "ask {pro} if anything is unclear",
    "I would still run it past {pro}",
    "your own case may differ",
    "I hope that helps",
    "please do not act on this alone",
    "{pro} will know your details better",
    "do check with {pro} before you act",
    "this cannot replace a talk with {pro}",
    "for a decision, see {pro}",
)

# Refusals that give a reason, to be followed by a referral.
REFUSALS_WITH_REASON = (
    "I would rather not go into {asp}, because {why}",
    "I am not the right one to settle {asp}, as {why}",
    "I have to pass on {asp}, since {why}",
    "it would be unwise of me to explain {asp}, for {why}",
    "{asp} is more than I can take on here, and {why}",
    "I must leave {asp} open, given that {why}",
    "{asp} is not a matter for a chat like this, because {why}",
    "forgive me for stepping back from {asp}, but {why}",
    "when it comes to {asp} I hold back, as {why}",
    "{why}, so {asp} is something I leave alone",
    "sadly {asp} goes beyond what I may discuss, and {why}",
    "my honest reply on {asp} is none at all, since {why}",
)

REFERRALS = (
    "please ask {pro}",
    "{pro} can talk it through with you",
    "could you raise it with {pro}?",
    "take the question to {pro}",
    "a visit to {pro} is the way forward",
    "I suggest an appointment with {pro}",
    "{pro} is the one to ask",
    "do speak to {pro} soon",
    "you will be in better hands with {pro}",
    "let {pro} look at it with you",
)

# Refusals that already say whom to see.
REFUSALS_WITH_REFERRAL = (
    "{asp} is best left to {pro}",
    "a question about {asp} belongs with {pro} rather than with me",
    "please take {asp} up with {pro} instead",
    "only {pro} should speak to {asp}",
    "on {asp} the safe course is to wait and see {pro}",
    "let me send you to {pro} for {asp}",
    "{pro} should guide you on {asp}, not I",
    "before anyone explains {asp} you should sit down with {pro}",
)

# What follows those, with a reason.
AFTER_REFERRAL = (
    "after all, {why}",
    "the reason is that {why}",
    "as you know, {why}",
    "bear in mind that {why}",
    "I say so because {why}",
    "remember that {why}",
)
