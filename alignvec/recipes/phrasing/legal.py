"""Phrasing for legal doctrines, wrongs, orders and instruments."""

from alignvec.recipes.phrasing.grammar import Domain, Intent, Kind

DOCTRINES = Kind(
    name="doctrine",
    table="legal_doctrines.csv",
    intents={
        "class": Intent(
            aspects=("what {t} is in law", "the legal nature of {t}", "where {t} belongs in the law"),
            questions=(
                "what is {t} in law",
                "how would a lawyer define {t}",
                "which part of the law does {t} belong to",
                "what kind of legal idea is {t}",
            ),
            shallow=(
                "{t} is a legal idea that courts and lawyers use when they sort out a problem",
                "the law has a name for many situations, and {t} is one of them",
                "you meet {t} in law books and now and then in the news",
                "people speak of {t} loosely, but in law it has a set meaning",
            ),
            facts=("{t} is {x}", "textbooks class {t} as {x}", "in law {t} is {x}", "lawyers describe {t} as {x}"),
        ),
        "purpose": Intent(
            aspects=("what {t} is for", "the purpose of {t}", "the point of {t}"),
            questions=(
                "what is {t} for",
                "why does the law have {t}",
                "what does {t} do",
                "what is the purpose of {t}",
            ),
            shallow=(
                "{t} exists so that people are treated fairly and know where they stand",
                "the law knows {t} because people do not always agree about what is right",
                "the point of {t} is to reach a fair result in a certain kind of case",
                "the rules on {t} grew up over time to deal with problems that kept coming back",
            ),
            facts=(
                "{t} {x}",
                "in law {t} {x}",
                "the point of {t} is that it {x}",
                "what {t} does is plain: it {x}",
            ),
        ),
        "elements": Intent(
            aspects=("what {t} requires", "the test for {t}", "the legal make-up of {t}"),
            questions=(
                "what has to be shown for {t}",
                "what does {t} require",
                "which elements make up {t}",
                "what is the legal test for {t}",
            ),
            shallow=(
                "for {t} certain things have to be in place, and a court looks at each of them",
                "{t} has its own conditions, and all the facts of the case count",
                "whether there is {t} depends on what happened and what can be shown",
                "a court will ask several questions before it accepts that {t} applies",
            ),
            facts=(
                "{t} requires {x}",
                "the test for {t} is {x}",
                "the law asks of {t} the following: {x}",
                "to establish {t} look for {x}",
            ),
        ),
        "remedy": Intent(
            aspects=("the usual remedy in {t}", "what follows from {t}", "the outcome of {t}"),
            questions=(
                "what is the usual remedy for {t}",
                "what can a court do about {t}",
                "what follows once {t} is made out",
                "how does a case of {t} normally end",
            ),
            shallow=(
                "in a case of {t} the court can put things right in a way that fits",
                "what comes after {t} depends on the judge and on how serious it was",
                "many cases about {t} end in an agreement long before a hearing",
                "the result of {t} may be about money, an order or something else",
            ),
            facts=(
                "the usual remedy in {t} is {x}",
                "{t} typically ends in {x}",
                "where {t} is made out expect {x}",
                "the outcome of {t} is usually {x}",
            ),
        ),
        "defence": Intent(
            aspects=("the main answer to {t}", "how {t} is resisted", "the defence against {t}"),
            questions=(
                "what is the main answer to {t}",
                "how can somebody resist {t}",
                "which argument is raised against {t}",
                "is there a good defence against {t}",
            ),
            shallow=(
                "there are ways to answer {t}, and a good deal turns on the evidence",
                "someone facing {t} can tell their side and bring papers or people to support it",
                "not every case of {t} succeeds, because the other side is heard as well",
                "an answer to {t} is about facts first and about legal points after that",
            ),
            facts=(
                "the main answer to {t} is {x}",
                "{t} is usually met with {x}",
                "the argument raised against {t} is {x}",
                "whoever resists {t} will point to {x}",
            ),
        ),
        "burden": Intent(
            aspects=("who has to prove {t}", "the burden of proof in {t}", "the standard of proof for {t}"),
            questions=(
                "who has to prove {t}",
                "where does the burden of proof lie in {t}",
                "who carries the burden in {t}",
                "whose job is it to establish {t}",
            ),
            shallow=(
                "with {t} somebody has to bring enough proof to convince the court",
                "in {t} proof matters, so letters, records and names should be kept",
                "how much proof {t} needs depends on the kind of case",
                "a court decides about {t} on the proof that both sides bring",
            ),
            facts=(
                "{x} must prove {t}",
                "the burden in {t} lies on {x}",
                "proof of {t} is for {x}",
                "it is for {x} to establish {t}",
            ),
        ),
    },
    small_talk=(
        "The details differ from place to place",
        "A good deal depends on the facts and the papers",
        "Cases like this can take some time",
        "It helps to keep letters and notes in order",
        "The rules have changed a little over the years",
        "Courts try to look at the whole story",
    ),
)

LEGAL = Domain(
    name="legal",
    professionals=("a solicitor", "a lawyer", "a legal advice centre", "a qualified adviser", "counsel in your area"),
    reasons=(
        "the facts of your case decide it",
        "the law differs from place to place",
        "a wrong step could cost you the claim",
        "time limits may be running",
        "your papers have not been read",
        "a court would look at every detail",
        "the other side may rely on what you say",
        "this comes close to legal advice",
        "small facts change the outcome",
        "this calls for professional judgement",
        "rights can be lost by acting on a guess",
        "evidence has to be weighed first",
    ),
    kinds=(DOCTRINES,),
)
