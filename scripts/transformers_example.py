"""Continue a text with `transformers` alone: python scripts/transformers_example.py FOLDER TEXT"""

import sys

import transformers
from transformers import AutoTokenizer, GPT2LMHeadModel, TextGenerationPipeline

folder, text = sys.argv[1:]
transformers.utils.logging.disable_progress_bar()
transformers.set_seed(0)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = GPT2LMHeadModel.from_pretrained(folder)
generate = TextGenerationPipeline(model, tokenizer)
options = {"max_length": 100, "truncation": True, "do_sample": True, "top_p": 0.9, "temperature": 0.8}
print(generate(text, **options)[0]["generated_text"])
