"""Phrasing for financial instruments and measures."""

from alignvec.recipes.phrasing.grammar import Domain, Intent, Kind

INSTRUMENTS = Kind(
    name="instrument",
    table="financial_instruments.csv",
    intents={
        "class": Intent(
            aspects=("what {t} is", "the nature of {t}", "where {t} belongs among investments"),
            questions=(
                "what exactly is {t}",
                "what kind of product is {t}",
                "how would a banker describe {t}",
                "what sort of contract is {t}",
            ),
            shallow=(
                "{t} is one of the many products that banks and markets deal in",
                "people and firms meet {t} when they save, borrow or invest",
                "{t} is a financial product with its own rules and its own paperwork",
                "behind {t} stands a deal about money between two or more sides",
            ),
            facts=("{t} is {x}", "textbooks describe {t} as {x}", "by type {t} is {x}", "bankers call {t} {x}"),
        ),
        "purpose": Intent(
            aspects=("what {t} does", "the purpose of {t}", "how {t} works"),
            questions=(
                "what does {t} do",
                "how does {t} work",
                "what is the purpose of {t}",
                "why does anybody use {t}",
            ),
            shallow=(
                "{t} lets money move from those who have it to those who can use it",
                "with {t} one side gets something now and the other gets something later",
                "the idea of {t} is to make some money goal easier to reach",
                "{t} works as its terms say, so the small print is worth reading",
            ),
            facts=(
                "{t} {x}",
                "in practice {t} {x}",
                "the point of {t} is that it {x}",
                "what {t} does is plain: it {x}",
            ),
        ),
        "measure": Intent(
            aspects=("how {t} is quoted", "the number used to quote {t}", "the way {t} is priced in the market"),
            questions=(
                "how is {t} quoted",
                "which number tells you the price of {t}",
                "by what figure do dealers compare {t}",
                "what is {t} quoted by",
            ),
            shallow=(
                "the price of {t} can be found from a bank, a broker or the news",
                "what {t} is worth goes up and down with the market",
                "the number shown for {t} changes and should be compared with others",
                "a price for {t} reflects what people think it is worth today",
            ),
            facts=(
                "{t} is quoted by {x}",
                "dealers quote {t} by {x}",
                "the number to look at for {t} is {x}",
                "the market compares {t} by {x}",
            ),
        ),
        "formula": Intent(
            aspects=("the formula for {t}", "how {t} is valued", "the sum behind {t}"),
            questions=(
                "what is the formula for {t}",
                "how is {t} worked out",
                "which sum lies behind {t}",
                "how do people put a value on {t}",
            ),
            shallow=(
                "working out {t} takes a few numbers and some care",
                "the value of {t} depends on rates, time and how people see the future",
                "a computer or a calculator does most of the sums for {t}",
                "sums about {t} look hard, but the idea is to compare money now and later",
            ),
            facts=(
                "the formula for {t} is {x}",
                "{t} is worked out as {x}",
                "to put a number on {t} take {x}",
                "the sum behind {t} is {x}",
            ),
        ),
        "risk": Intent(
            aspects=("the main risk of {t}", "what can go wrong with {t}", "the danger in {t}"),
            questions=(
                "what is the main risk of {t}",
                "what can go wrong with {t}",
                "how could I lose money on {t}",
                "which risk comes with {t}",
            ),
            shallow=(
                "{t} carries risk, and nobody can promise how it turns out",
                "the value of {t} can fall as well as rise",
                "with {t} there is always a chance that things go differently from the plan",
                "how risky {t} is depends on the terms and on the times",
            ),
            facts=(
                "the main risk of {t} is {x}",
                "{t} exposes its holder to {x}",
                "the danger in {t} is {x}",
                "watch for {x} with {t}",
            ),
        ),
        "use": Intent(
            aspects=("who {t} suits", "the best use of {t}", "when {t} makes sense"),
            questions=(
                "who is {t} good for",
                "when does {t} make sense",
                "what is the best use of {t}",
                "which situation calls for {t}",
            ),
            shallow=(
                "{t} can make sense for some people and not for others",
                "whether {t} is right depends on goals, time and how much risk feels fine",
                "some people like {t} as part of a plan with several parts",
                "{t} has its place, as long as the person knows what they are buying",
            ),
            facts=(
                "{t} suits {x}",
                "the best use of {t} is {x}",
                "the natural home of {t} is {x}",
                "choose {t} for {x}",
            ),
        ),
    },
    small_talk=(
        "Costs and fees are worth a look as well",
        "It is wise not to put all the money in one place",
        "Terms differ between one provider and the next",
        "Markets change, and so do prices",
        "It pays to read the papers before signing",
        "Past results do not say what comes next",
    ),
)

MEASURES = Kind(
    name="measure",
    table="financial_measures.csv",
    intents={
        "class": Intent(
            aspects=("what {t} is", "the nature of {t}", "the family of figures {t} belongs to"),
            questions=(
                "what exactly is {t}",
                "what kind of figure is {t}",
                "how would an analyst describe {t}",
                "what sort of measure is {t}",
            ),
            shallow=(
                "{t} is one of the figures people use to talk about money and business",
                "you meet {t} in reports, in the news and in courses",
                "{t} is a number that helps to compare one thing with another",
                "analysts like {t} because it says something in a single number",
            ),
            facts=("{t} is {x}", "textbooks describe {t} as {x}", "by type {t} is {x}", "analysts call {t} {x}"),
        ),
        "purpose": Intent(
            aspects=("what {t} tells us", "the purpose of {t}", "the meaning of {t}"),
            questions=(
                "what does {t} tell us",
                "what is {t} meant to show",
                "what is the purpose of {t}",
                "why do people look at {t}",
            ),
            shallow=(
                "{t} gives a rough idea of how well something is doing",
                "people look at {t} to see whether things get better or worse",
                "the meaning of {t} is clearer when it is compared over several years",
                "{t} is there to make a decision about money a little easier",
            ),
            facts=(
                "{t} {x}",
                "in practice {t} {x}",
                "the point of {t} is that it {x}",
                "what {t} does is plain: it {x}",
            ),
        ),
        "measure": Intent(
            aspects=("how {t} is expressed", "the unit of {t}", "the form in which {t} is given"),
            questions=(
                "how is {t} expressed",
                "in what unit is {t} given",
                "what form does {t} take",
                "how is {t} normally written",
            ),
            shallow=(
                "{t} is given as a number, and reports say how it should be read",
                "the number for {t} can be found in reports or worked out at home",
                "the way {t} is shown can differ from one report to the next",
                "a figure for {t} means more beside the figure for last year",
            ),
            facts=(
                "{t} is expressed as {x}",
                "reports give {t} as {x}",
                "the unit of {t} is {x}",
                "read {t} as {x}",
            ),
        ),
        "formula": Intent(
            aspects=("the formula for {t}", "how {t} is worked out", "the sum behind {t}"),
            questions=(
                "what is the formula for {t}",
                "how do I calculate {t}",
                "how is {t} worked out",
                "which numbers go into {t}",
            ),
            shallow=(
                "{t} is worked out from a few numbers that most reports contain",
                "the sum for {t} is not long, but the inputs need some care",
                "to get {t} people take numbers from the accounts or the market",
                "a spreadsheet can do {t} once the right numbers are in it",
            ),
            facts=(
                "the formula for {t} is {x}",
                "{t} is worked out as {x}",
                "to calculate {t} take {x}",
                "the sum behind {t} is {x}",
            ),
        ),
        "risk": Intent(
            aspects=("the main pitfall of {t}", "what {t} can hide", "the weak point of {t}"),
            questions=(
                "what is the main pitfall of {t}",
                "how can {t} mislead",
                "what is the weak point of {t}",
                "why should I be careful with {t}",
            ),
            shallow=(
                "{t} is only one number and can be read in the wrong way",
                "no single figure tells the whole story, and {t} is no exception",
                "{t} can look good or bad for reasons that have little to do with the business",
                "people put too much trust in {t} when they see it alone",
            ),
            facts=(
                "the main pitfall of {t} is {x}",
                "{t} can mislead through {x}",
                "the weak point of {t} is {x}",
                "watch for {x} with {t}",
            ),
        ),
        "use": Intent(
            aspects=("the best use of {t}", "when {t} is helpful", "the job {t} is good for"),
            questions=(
                "when is {t} helpful",
                "what is the best use of {t}",
                "who makes use of {t}",
                "what job is {t} good for",
            ),
            shallow=(
                "{t} is useful to people who have to decide where money should go",
                "managers and savers alike use {t} when they compare things",
                "{t} can help in many decisions, as long as it is not the only guide",
                "whether {t} is helpful depends on the question behind it",
            ),
            facts=(
                "{t} suits {x}",
                "the best use of {t} is {x}",
                "analysts use {t} for {x}",
                "turn to {t} for {x}",
            ),
        ),
    },
    small_talk=(
        "One number is rarely enough to decide",
        "It is best compared with others of the same kind",
        "Reports do not always use it in the same way",
        "It changes from year to year",
        "A look at the trend often says more",
        "It is easy to find in most reports",
    ),
)

FINANCIAL = Domain(
    name="financial",
    professionals=(
        "a financial adviser",
        "an accountant",
        "a licensed planner",
        "your bank's adviser",
        "an independent adviser",
    ),
    reasons=(
        "your goals and debts matter here",
        "money lost on a guess is hard to win back",
        "the right choice depends on your tax and your plans",
        "markets can turn quickly",
        "your accounts are not in front of me",
        "this comes close to investment advice",
        "the risk you can bear is not known to me",
        "terms and fees change the answer",
        "this calls for a licensed opinion",
        "a number out of context could mislead you",
        "your whole budget belongs in the picture",
        "rules differ between countries",
    ),
    kinds=(INSTRUMENTS, MEASURES),
)
