"""The prompts of LongBench's English tasks and of code, as its authors publish them for their files of `context` and `input`
(THUDM/LongBench, config/dataset2prompt.json)."""

import re

_PASSAGES = "Answer the question based on the given passages. Only give me the answer and do not output any other words."
_SHORTLY = "as concisely as you can, using a single phrase if possible. Do not provide any explanation."
_OF_ARTICLE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered based on "
    "the information in "
    'the article, write "unanswerable". If the question is a yes/no question, answer "yes", "no", or "unanswerable". Do not provide any '
    "explanation."
)
_MULTI_HOP = f"{_PASSAGES}\n\nThe following are given passages.\n{{context}}\n\n{_PASSAGES}\n\nQuestion: {{input}}\nAnswer:"

TEMPLATES = {
    "narrativeqa": (
        f"You are given a story, which can be either a novel or a movie script, and a question. Answer the question {_SHORTLY}\n\n"
        f"Story: {{context}}\n\nNow, answer the question based on the story {_SHORTLY}\n\nQuestion: {{input}}\n\nAnswer:"
    ),
    "qasper": (
        f"You are given a scientific article and a question. Answer the question {_OF_ARTICLE}\n\nArticle: {{context}}\n\n"
        f" Answer the question based on the above article {_OF_ARTICLE}\n\nQuestion: {{input}}\n\nAnswer:"
    ),
    "multifieldqa_en": (
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on the "
        "above text, only give me "
        "the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:"
    ),
    "hotpotqa": _MULTI_HOP,
    "2wikimqa": _MULTI_HOP,
    "musique": _MULTI_HOP,
    "gov_report": (
        "You are given a report by a government agency. Write a one-page summary of the report.\n\nReport:\n{context}\n\n"
        "Now, write a one-page summary of the report.\n\nSummary:"
    ),
    "qmsum": (
        "You are given a meeting transcript and a query containing a question or instruction. Answer the query in one or "
        "more sentences.\n\n"
        "Transcript:\n{context}\n\nNow, answer the query based on the above meeting transcript in one or more sentences.\n\n"
        "Query: {input}\nAnswer:"
    ),
    "multi_news": (
        "You are given several news passages. Write a one-page summary of all news. \n\nNews:\n{context}\n\n"
        "Now, write a one-page summary of all the news.\n\nSummary:"
    ),
    "trec": "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
    "triviaqa": (
        "Answer the question based on the given passage. Only give me the answer and do not output any other words. The following are some "
        "examples.\n\n{context}\n\n{input}"
    ),
    "samsum": "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
    "passage_count": (
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully read "
        "these paragraphs and "
        "determine how many unique paragraphs there are after removing duplicates. In other words, how many "
        "non-repeating paragraphs are there "
        "in total?\n\n{context}\n\nPlease enter the final count of unique paragraphs after removing duplicates. The "
        "output format should only "
        "contain the number, such as 1, 2, 3, and so on.\n\nThe final answer is: "
    ),
    "passage_retrieval_en": (
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the abstract is "
        "from.\n\n{context}\n\n"
        "The following is an abstract.\n\n{input}\n\nPlease enter the number of the paragraph that the abstract is from. "
        "The answer format must "
        'be like "Paragraph 1", "Paragraph 2", etc.\n\nThe answer is: '
    ),
    "lcc": "Please complete the code given below. \n{context}Next line of code:\n",
    "repobench-p": "Please complete the code given below. \n{context}{input}Next line of code:\n",
}


def longbench_prompt(task: str, context: str, question: str = "") -> str:
    """Fills in the template of a task; braces in the texts stay what they are."""
    values = {"context": context, "input": question}
    return re.sub(r"\{(context|input)\}", lambda found: values[found[1]], TEMPLATES[task])


def asks_a_question(task: str) -> bool:
    """Whether the template of a task has a place for `input`."""
    return "{input}" in TEMPLATES[task]
