"""Reading: words and numbers on one to three lines, real handwritten digits among them (`written_lines/mixed`).

A decoder learns it from nothing, by letters: a tokenizer this small has hardly a longer piece, and half the words of
the evaluation are new (`held_out`). Scored by character and word error rate.

    --config=configs/ocr.py              an hour on two idle CPU cores; scores in docs/scores.md
    --config=configs/ocr.py:smoke
    --config=configs/ocr.py:seed=1,split=validation
"""

from ml_collections import ConfigDict

from configs import digits
from configs.arguments import parse_arg
from configs.quickstart import READ, adamw, base, decoder, train_pipeline

SIZE = 64  # pixels


def get_config(arg: str = '') -> ConfigDict:
    args = parse_arg(arg, smoke=False, seed=0, split='test')
    data = dict(dataset='written_lines/mixed_tiny' if args['smoke'] else 'written_lines/mixed')
    data['pipeline'] = train_pipeline(SIZE, READ)
    config = base(args, SIZE, text=24)
    config.task = 'generative'
    config.total = dict(steps=20 if args['smoke'] else 6000)
    config.batch_size = 64
    config.tokenizer.vocab_size = 320
    config.model.update(image=digits.image_tower(), decoder=decoder())
    config.data.sources = dict(lines=data)
    config.optimizer = adamw(1e-3)
    config.evals = dict(
        read=dict(
            data,
            kind='generation',
            split=args['split'],
            max_new_tokens=20,
            metrics=('character_error_rate', 'word_error_rate', 'exact_match'),
            slices=('held_out', 'num_lines'),
        )
    )
    return config
