"""Prompts of the tests of the whole: twenty, five of them Korean."""

CHAT_PROMPTS = (
    "대한민국의 수도는 어디인가요?",
    "안녕하세요! 자기소개를 한 문장으로 해 주세요.",
    "'질주'라는 낱말로 짧은 글을 지어 주세요.",
    "한글은 누가 만들었나요?",
    "1부터 10까지 한국어로 세어 주세요.",
    "Explain in one sentence why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "List three fruits that are red, separated by commas.",
    "Translate to French: The library opens at nine in the morning.",
    "What is 17 times 23?",
    "Name the largest planet of the solar system.",
    "Write a haiku about a runner.",
    "Give me a JSON object with the keys name and age.",
    "What does HTTP status 429 mean?",
    "Who wrote Pride and Prejudice?",
    "Continue: Once upon a time there was a token that",
    "Sort these numbers: 9, 3, 27, 1.",
    "🏃‍♀️💨 What do these emoji mean?",
    "Say nothing but the word yes.",
    "Why do cats purr?",
)
