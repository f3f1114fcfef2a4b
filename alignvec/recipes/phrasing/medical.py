"""Phrasing for medicines and conditions."""

from alignvec.recipes.phrasing.grammar import Domain, Intent, Kind

DRUGS = Kind(
    name="drug",
    table="medical_drugs.csv",
    intents={
        "class": Intent(
            aspects=("what kind of medicine {t} is", "the drug family of {t}", "where {t} sits among medicines"),
            questions=(
                "what kind of drug is {t}",
                "which family of medicines does {t} belong to",
                "what class does {t} fall under",
                "how would you classify {t}",
            ),
            shallow=(
                "{t} is one of a group of related medicines that act in much the same way",
                "medicines come in families, and {t} has close relatives that do a similar job",
                "think of {t} as a member of a family of medicines with similar names and uses",
                "doctors know {t} as part of a group of medicines that work alike",
            ),
            facts=(
                "{t} is {x}",
                "{t} is classed as {x}",
                "pharmacologists call {t} {x}",
                "by class {t} is {x}",
            ),
        ),
        "indication": Intent(
            aspects=("what {t} is for", "the main use of {t}", "the reason {t} is prescribed"),
            questions=(
                "what is {t} used for",
                "when do doctors choose {t} first",
                "why would anybody be given {t}",
                "which problem is {t} meant to treat",
            ),
            shallow=(
                "{t} is given when a doctor thinks it will ease a problem or keep it from getting worse",
                "people take {t} for a health problem that a doctor has found, often beside other care",
                "a doctor may offer {t} when simple steps have not been enough",
                "the idea of {t} is to treat an illness or its symptoms so that daily life is easier",
            ),
            facts=(
                "{t} is used first for {x}",
                "the main use of {t} is {x}",
                "doctors reach for {t} in {x}",
                "the standard reason to give {t} is {x}",
            ),
        ),
        "dose": Intent(
            aspects=("the usual dose of {t}", "how much {t} an adult starts with", "how {t} is dosed"),
            questions=(
                "what is the starting dose of {t}",
                "how much {t} does an adult take at first",
                "how is {t} usually dosed",
                "what amount of {t} is normal to begin with",
            ),
            shallow=(
                "{t} comes in set strengths, and the amount is chosen for the person and the problem",
                "the label on {t} gives the amount and the times, and both should be followed",
                "how much {t} is right depends on age, weight and what it is for",
                "the amount of {t} is set at the start and changed only when a doctor says so",
            ),
            facts=(
                "the usual adult starting dose of {t} is {x}",
                "adults usually begin {t} at {x}",
                "prescribers start {t} at {x}",
                "a first prescription of {t} reads {x}",
            ),
        ),
        "mechanism": Intent(
            aspects=("how {t} works", "what {t} does in the body", "the action of {t}"),
            questions=(
                "how does {t} work",
                "what does {t} actually do in the body",
                "by what action does {t} help",
                "what is going on inside when someone takes {t}",
            ),
            shallow=(
                "{t} changes something in the body so that the problem behind the symptoms settles down",
                "once {t} is in the blood it acts on the part of the body that needs help",
                "like most medicines {t} works by nudging the body's own chemistry in a helpful direction",
                "the effect of {t} builds up in the body and fades again when it is stopped",
            ),
            facts=(
                "{t} {x}",
                "in the body {t} {x}",
                "the point of {t} is that it {x}",
                "at the usual dose {t} {x}",
            ),
        ),
        "adverse": Intent(
            aspects=("the main harm of {t}", "what to watch for with {t}", "the side effect profile of {t}"),
            questions=(
                "what are the side effects of {t}",
                "what should I watch for with {t}",
                "is there a danger in taking {t}",
                "which unwanted effects does {t} have",
            ),
            shallow=(
                "{t} can have side effects like any medicine, though many people notice few of them",
                "some people feel unwell on {t}, mostly early on, and the leaflet lists what can happen",
                "side effects of {t} differ from person to person and are often mild",
                "most people get on with {t}, but a new symptom is worth a mention to a doctor",
            ),
            facts=(
                "watch for {x} with {t}",
                "{t} can cause {x}",
                "the harm to know with {t} is {x}",
                "the price of {t} may be {x}",
            ),
        ),
        "monitoring": Intent(
            aspects=("the follow-up of {t}", "what to check with {t}", "the monitoring that {t} needs"),
            questions=(
                "what should be checked while someone takes {t}",
                "which monitoring does {t} need",
                "what follow-up goes with {t}",
                "what do doctors keep an eye on with {t}",
            ),
            shallow=(
                "people on {t} may be seen now and then to make sure that it suits them",
                "with {t} a doctor may want a visit or a test from time to time",
                "follow-up of {t} is mostly about how the person feels and whether it helps",
                "checks while on {t} are there to see that it works and does no harm",
            ),
            facts=(
                "check {x} with {t}",
                "before and during {t} check {x}",
                "anyone on {t} needs a look at {x}",
                "follow-up of {t} means watching {x}",
            ),
        ),
    },
    small_talk=(
        "It should be taken as the label says",
        "It is best not to stop or change it without asking",
        "How well it helps varies from one person to the next",
        "The leaflet in the box says more about it",
        "It helps to mention any other medicines at the same time",
        "It is kept away from children like any medicine",
    ),
)

CONDITIONS = Kind(
    name="condition",
    table="medical_conditions.csv",
    intents={
        "class": Intent(
            aspects=("what kind of illness {t} is", "the nature of {t}", "where {t} belongs among illnesses"),
            questions=(
                "what kind of illness is {t}",
                "how would you define {t}",
                "what sort of problem is {t}",
                "how do doctors classify {t}",
            ),
            shallow=(
                "{t} is a health problem that doctors see often and know how to look into",
                "doctors speak of {t} when they see a certain pattern of symptoms and findings",
                "people with {t} can be affected in different ways, from mild to serious",
                "the word for it sounds technical, but {t} is a known illness with known care",
            ),
            facts=("{t} is {x}", "textbooks define {t} as {x}", "by nature {t} is {x}", "doctors class {t} as {x}"),
        ),
        "mechanism": Intent(
            aspects=("how {t} comes about", "the process behind {t}", "what {t} does in the body"),
            questions=(
                "what happens in the body with {t}",
                "what is the process behind {t}",
                "how does {t} do its damage",
                "what is actually going wrong in {t}",
            ),
            shallow=(
                "{t} comes about when part of the body stops doing its job as it should",
                "several things can play a part in {t}, such as age, family and way of life",
                "with {t} something in the body is out of balance, and symptoms follow from that",
                "the cause of {t} is not the same for everyone and can take time to find",
            ),
            facts=(
                "{t} {x}",
                "in the body {t} {x}",
                "the trouble with {t} is that it {x}",
                "step by step {t} {x}",
            ),
        ),
        "hallmark": Intent(
            aspects=("the typical sign of {t}", "how {t} shows itself", "the picture that points to {t}"),
            questions=(
                "how does {t} show itself",
                "what is the typical sign of {t}",
                "which symptom points to {t}",
                "how would somebody notice {t}",
            ),
            shallow=(
                "{t} can show itself in many ways, and a new or lasting symptom is worth a visit",
                "people with {t} often just feel that something is not right",
                "signs of {t} may come slowly or all at once and differ between people",
                "a doctor spots {t} by listening to the story and looking at the person",
            ),
            facts=(
                "the hallmark of {t} is {x}",
                "{t} shows itself by {x}",
                "the picture that points to {t} is {x}",
                "think of {t} on seeing {x}",
            ),
        ),
        "test": Intent(
            aspects=("the key test for {t}", "how {t} is confirmed", "the way {t} is diagnosed"),
            questions=(
                "which test confirms {t}",
                "how is {t} diagnosed",
                "what is the key test for {t}",
                "how do doctors make sure that it is {t}",
            ),
            shallow=(
                "{t} is found by talking, an examination and perhaps a test or two",
                "tests for {t} are chosen after a doctor has heard the story",
                "to look into {t} a doctor may order tests and repeat them later",
                "no two people need quite the same tests for {t}",
            ),
            facts=(
                "the key test for {t} is {x}",
                "{t} is confirmed by {x}",
                "the way to diagnose {t} is {x}",
                "doctors look for {t} with {x}",
            ),
        ),
        "treatment": Intent(
            aspects=("the first treatment of {t}", "how {t} is treated", "the usual care for {t}"),
            questions=(
                "how is {t} treated",
                "what is the first treatment for {t}",
                "what do doctors offer for {t}",
                "which treatment helps with {t}",
            ),
            shallow=(
                "{t} can be treated, and the plan depends on how bad it is",
                "care for {t} may mean medicines, changes in daily life or a procedure",
                "treatment of {t} aims to ease symptoms and to keep them from coming back",
                "many people with {t} do well once the right treatment is found",
            ),
            facts=(
                "first-line treatment of {t} is {x}",
                "{t} is treated first with {x}",
                "the usual care for {t} is {x}",
                "doctors treat {t} with {x}",
            ),
        ),
        "complication": Intent(
            aspects=("the danger of {t}", "what {t} may lead to", "the risk of leaving {t} alone"),
            questions=(
                "what happens if {t} is left alone",
                "what can {t} lead to",
                "which complication of {t} matters most",
                "is {t} dangerous without treatment",
            ),
            shallow=(
                "{t} can get worse over time if nobody looks into it",
                "left alone {t} may cause more trouble later, so early care is wise",
                "the outlook with {t} differs, and most people do better with early help",
                "problems from {t} can be kept down by good care and regular visits",
            ),
            facts=(
                "left alone {t} may lead to {x}",
                "the danger of {t} is {x}",
                "untreated {t} may end in {x}",
                "the complication to fear in {t} is {x}",
            ),
        ),
    },
    small_talk=(
        "It affects people of many ages and walks of life",
        "Early help usually makes things easier",
        "How it goes differs from one person to the next",
        "Good information and regular visits help a lot",
        "It is worth writing symptoms down before a visit",
        "Family and friends can be a help as well",
    ),
)

MEDICAL = Domain(
    name="medical",
    professionals=("a doctor", "a pharmacist", "your own doctor", "a nurse at the clinic", "your care team"),
    reasons=(
        "your history matters here",
        "the dose and the risk differ between people",
        "a wrong word could do harm",
        "your other medicines are not known to me",
        "nobody has examined you yet",
        "symptoms can mislead",
        "test results belong in the picture",
        "health advice should come from someone who sees you",
        "allergies and age can change the answer",
        "this touches on treatment",
        "this calls for clinical judgement",
        "a mistake about health is hard to undo",
    ),
    kinds=(DRUGS, CONDITIONS),
)
