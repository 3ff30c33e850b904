"""Complete what you type, and print the text while it is generated. An empty line or Ctrl-D ends the program.

python examples/stream_chat.py
echo "class Queue:" | python examples/stream_chat.py
"""

from __future__ import annotations

import argparse

from fastgpt2 import GPT2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded", help="a folder, a file, or a name on the hub")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    args = parser.parse_args()

    model = GPT2.from_pretrained(args.model)
    while True:
        try:
            prompt = input("> ")
        except EOFError:
            return
        if not prompt:
            return
        for event in model.stream(prompt, max_new_tokens=args.max_new_tokens, temperature=0.7, top_k=50):
            print(event.text, end="", flush=True)
        print()


if __name__ == "__main__":
    main()
