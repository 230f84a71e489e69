"""What only a GPU can show: the captured step is the full pass, and seeds stand alone there too."""

import pytest
import torch
import torch.nn.functional as F

from clipgen import ClipGen
from clipgen.sampling import Sampler
from tests.micro import micro_bundle, micro_gpt

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
PLAIN = {"temperature": 1.0, "top_k": 9, "top_p": 0.9}


def test_greedy_codes_are_the_argmax_of_the_full_pass():
    gpt = micro_gpt(null_embedding=True).cuda()
    embeddings = F.normalize(torch.randn(20, 32), dim=1).cuda()
    codes = Sampler(gpt).sample(embeddings, range(20), 0, 0, 1, 1)
    with torch.no_grad():
        logits = gpt(embeddings, codes[:, :-1])
    best = logits.topk(2).values
    clear = (best[..., 0] - best[..., 1] > 1e-3).cpu()
    assert torch.equal(logits.argmax(2).cpu()[clear], codes[clear])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_an_image_depends_on_its_own_seed_alone(dtype, guidance):
    if dtype is torch.bfloat16 and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("no bfloat16 on this GPU")
    sampler = Sampler(micro_gpt(null_embedding=True).to("cuda", dtype))
    embeddings = F.normalize(torch.randn(21, 32), dim=1)
    together = sampler.sample(embeddings, range(21), guidance=guidance, **PLAIN)
    for i in (0, 7, 20):
        alone = sampler.sample(embeddings[i:i + 1], [i], guidance=guidance, **PLAIN)
        assert torch.equal(alone[0], together[i])


def test_memory_stays_level_and_parts_compose(tmp_path):
    model = ClipGen.load(micro_bundle(tmp_path / "micro", null_embedding=True))
    for seed in range(30):
        images = model.generate("a cat", 2, 4, seed, guidance=1.0 + seed % 2)
        if seed == 5:
            before = torch.cuda.memory_allocated()
    assert len(images) == 2 and torch.cuda.memory_allocated() == before
    e = model.clip.embed_texts(["a cat"])
    codes = model.sample(e, [0])
    assert model.gpt(e, codes.flatten(1)[:, :-1]).shape == (1, 16, 64)
    assert model.vqgan.decode(codes).shape == (1, 3, 32, 32)
