"""Rewards for post-training: what a judge of pictures is, and those that come with the package.

| kind       | looks at                     | files                                                                   |
|------------|------------------------------|-------------------------------------------------------------------------|
| target     | picture, true picture        | none                                                                    |
| hpsv3      | prompt, picture              | MizzenAI/HPSv3: HPSv3.safetensors; base Qwen/Qwen2-VL-7B-Instruct       |
| editreward | instruction, source, picture | TIGER-Lab/EditReward-…: model.safetensors; base as its name says        |

Of a base model config.json and tokenizer.json are read, no weights: the checkpoints are whole. A config names both
places (`config.RewardConfig`); `load.load_rewards` builds the weighted sum. `base.Reward` is the protocol for your own.
"""
