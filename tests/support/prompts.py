"""Twenty prompts of many kinds, in several languages."""

from __future__ import annotations

PROMPTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "def fibonacci(n):\n    ",
    "Water boils at 100 degrees Celsius because",
    "To make a good cup of tea, first",
    "The three laws of thermodynamics are:\n1.",
    "Q: How many legs does a spider have?\nA:",
    "SELECT name, age FROM people WHERE",
    "Dear Sir or Madam,\n\nI am writing to",
    "The prime numbers below 30 are 2, 3, 5,",
    "In 1969, Neil Armstrong",
    "<html>\n<head>\n<title>",
    "Roses are red, violets are blue,",
    "Photosynthesis is the process by which",
    "My favourite recipe for pancakes: mix flour,",
    "The quick brown fox",
    "Für Elise ist ein Klavierstück von",
    "Il était une fois une princesse qui",
    "1 + 1 = 2, 2 + 2 = 4, 3 + 3 =",
    "The difference between a virus and a bacterium is that",
)
