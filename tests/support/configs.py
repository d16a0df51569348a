"""A config with other values, and the characters of the corpus that all tests share."""

CHARACTERS = "这是很久之前的事情了我们在北京看见一只大鸟飞过山河人说好天水火木金土日月年时书车马"


def changed(config, **keys):
    """Returns `config` with dotted keys, dots written as `__`, set to other values."""
    from gpt2_flax.config.parse import parse_config

    values = config.model_dump(exclude_none=True)
    for key, value in keys.items():
        *sections, last = key.split("__")
        place = values
        for section in sections:
            place = place[section]
        place[last] = value
    changed_config = parse_config(values, "test")
    size = changed_config.model.vocab_size
    return changed_config if size is None else changed_config.with_vocab_size(size)
