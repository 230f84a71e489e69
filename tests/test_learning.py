"""What a training step computes: its loss against plain lines, what the model receives, and that it
learns one batch by heart."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from clipgen.clip import CLIP, vocabulary_of
from clipgen.gpt import GPT, GPTConfig
from clipgen.sampling import Sampler
from clipgen.vqgan import VQGAN, VQGANConfig
from scripts.data.presets import open_images
from scripts.data.shards import read_shards
from scripts.data.transforms import order
from scripts.training.clip import CLIPSettings, CLIPTask, small_config
from scripts.training.gpt import GPTSettings, GPTTask
from scripts.training.losses import CLIPDistance
from scripts.training.optim import learning_rate
from scripts.training.trainer import State
from scripts.training.vqgan import VQGANBatch, VQGANSettings, VQGANTask
from tests.micro import micro_clip
from tests.processes import micro_images, micro_shards

STEPS, BATCH, XI = 40, 8, 0.5


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return micro_shards(tmp_path_factory.mktemp("data") / "shards")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return open_images(micro_images(tmp_path_factory.mktemp("images")))[0]


@pytest.fixture
def gpt_state(accelerator, shards):
    def make(steps=STEPS, **changes):
        settings = GPTSettings(**{"shards": shards, "run": Path("run"), "batch": BATCH, "noise": XI,
                                  "drop_condition": 0.5} | changes)
        gpt = GPT(GPTConfig(layers=2, width=32, heads=4, codebook_size=32, block_size=16,
                            embedding_dim=16, null_embedding=settings.drop_condition > 0))
        gpt.initialise()
        with torch.no_grad():  # as initialised all codes are as likely, in any order
            gpt.position.normal_()
            gpt.head.weight.normal_()
        task = GPTTask(settings, accelerator, gpt, read_shards(shards),
                       read_shards(shards, "validation"))
        return State(task, settings, accelerator, steps)

    return make


@pytest.fixture
def vqgan_state(accelerator, images):
    def make(steps=STEPS, perceptual=None, **changes):
        settings = VQGANSettings(**{"images": "images", "run": Path("run"), "batch": 4,
                                    "perceptual_loss": "none", "gan": 0.0} | changes)
        vqgan = VQGAN(VQGANConfig(16, (16, 16), (), 1, 8, 64, True, 0))
        vqgan.initialise()
        task = VQGANTask(settings, accelerator, steps, vqgan, images,
                         torch.zeros(1, 3, 16, 16, dtype=torch.uint8), perceptual)
        return State(task, settings, accelerator, steps)

    return make


@pytest.fixture
def clip_state(accelerator, images):
    def make(steps=STEPS, batch=BATCH, **changes):
        settings = CLIPSettings(**{"images": "images", "run": Path("run"), "batch": batch,
                                   "size": 32, "width": 8, "text_width": 32, "text_layers": 1,
                                   "embedding_dim": 16} | changes)
        lines = [images.captions(i) for i in range(len(images))]
        clip = CLIP(small_config(vocabulary_of({x for each in lines for x in each}), settings))
        task = CLIPTask(settings, accelerator, steps, clip, images, lines, None)
        return State(task, settings, accelerator, steps)

    return make


@pytest.fixture(params=["gpt", "vqgan", "clip"])
def any_state(request):
    return request.getfixturevalue(f"{request.param}_state")


def keep_batch(state):
    """All steps train on the batch of the first."""
    batch = state.task.batch(0)
    state.task.batch = lambda step: batch
    return batch


def received(module):
    """What a module is called with from now on, call by call."""
    calls = []
    module.register_forward_pre_hook(lambda _, given: calls.append(given))
    return calls


# GPT


def rows_of(state, step):
    """(codes, clean embeddings) (BATCH, crops, ...) of the images that a step is about."""
    data = state.task.data
    rows = torch.as_tensor(order(len(data), step * BATCH, BATCH, 0))
    crops = [data.rows(rows, torch.full_like(rows, crop)) for crop in range(data.crops)]
    return tuple(torch.stack(kind, 1) for kind in zip(*crops, strict=True))


def test_the_loss_of_a_gpt_step(gpt_state):
    state = gpt_state()
    before, calls = copy.deepcopy(state.task.model), received(state.task.model)
    found = state.step(3)["loss"].item()
    (conditions, inputs), = calls
    codes = [next(crop for crop in crops if crop[:-1] == given)  # of one crop, and in their order
             for given, crops in zip(inputs.tolist(), rows_of(state, 3)[0].tolist(), strict=True)]
    nats = []
    for place in range(16):
        logits = before(conditions, torch.tensor(codes)[:, :place])[:, -1].tolist()
        for row, own in zip(logits, codes, strict=True):
            nats.append(math.log(sum(map(math.exp, row))) - row[own[place]])
    assert len(nats) == BATCH * 16
    assert found == pytest.approx(sum(nats) / len(nats), rel=1e-5)


def test_the_gpt_receives_noise_and_now_and_then_the_null_embedding(gpt_state):
    state = gpt_state(lr=0.0)
    calls = received(state.task.model)
    dropped, cosines, seen = 0, [], set()
    for step in range(STEPS):
        state.step(step)
        clean = rows_of(state, step)[1]
        for condition, own in zip(calls[-1][0], clean, strict=True):
            if torch.equal(condition, state.task.model.null_embedding):
                dropped += 1
                continue
            assert condition.norm().item() == pytest.approx(1, abs=1e-5)
            cosines.append((own @ condition).max().item())
            seen.add(tuple(condition.tolist()))
    assert dropped / (STEPS * BATCH) == pytest.approx(0.5, abs=0.1)
    assert len(seen) == len(cosines)  # fresh noise each time
    # normalise(e + ξ n) of unit e and n is at most asin ξ from e, on average about atan ξ.
    assert min(cosines) >= math.sqrt(1 - XI**2) - 1e-5
    assert sum(cosines) / len(cosines) == pytest.approx(1 / math.sqrt(1 + XI**2), abs=0.03)


def test_without_noise_the_gpt_receives_the_very_embeddings(gpt_state):
    state = gpt_state(noise=0.0, drop_condition=0.0)
    calls = received(state.task.model)
    state.step(0)
    for condition, own in zip(calls[0][0], rows_of(state, 0)[1], strict=True):
        assert (own - condition).abs().amax(1).min() < 1e-6


def test_of_the_codes_that_are_seen_some_are_of_other_images(gpt_state):
    """Those to predict stay as they are; how many differ is drawn for each image, up to a share."""
    task = gpt_state(batch=64, corruption=0.8).task
    batches = [task.batch(step) for step in range(20)]
    plain = gpt_state(batch=64).task
    for step, batch in enumerate(batches):
        assert torch.equal(batch.codes, plain.batch(step).codes)
        others = batch.codes.roll(1, 0)
        assert ((batch.seen == batch.codes) | (batch.seen == others)).all()
    shares = torch.cat([(batch.seen != batch.codes).float().mean(1) for batch in batches])
    # Of 16 random codes of 32 one in 32 is the same in the other image.
    assert 0.36 < shares.mean() < 0.42 and shares.min() == 0 and 0.75 < shares.max() <= 1
    first = plain.batch(0)
    assert torch.equal(first.seen, first.codes)


def test_a_gpt_sees_the_wrong_codes_and_predicts_the_right_ones(gpt_state):
    state = gpt_state(corruption=1.0, drop_condition=0.0)
    before, batch = copy.deepcopy(state.task.model), keep_batch(state)
    assert (batch.seen != batch.codes).float().mean() > 0.3
    loss = state.step(0)["loss"]
    logits = before(batch.conditions, batch.seen[:, :-1])
    torch.testing.assert_close(loss, F.cross_entropy(logits.flatten(0, 1), batch.codes.flatten()))


def test_a_gpt_learns_a_batch_by_heart_and_draws_its_codes(gpt_state):
    state = gpt_state(steps=120, lr=1e-2, warmup=5, drop_condition=0.0)
    batch = keep_batch(state)
    losses = [state.step(step)["loss"].item() for step in range(120)]
    assert losses[0] > 3 and losses[-1] < 0.05
    drawn = Sampler(state.task.model.eval()).sample(batch.conditions, range(BATCH), temperature=0.0,
                                                    top_k=0, top_p=1.0, guidance=1.0)
    assert torch.equal(drawn, batch.codes)


# VQGAN


def plain_copies(vqgan, pixels, quantized):
    """(copies, z, code vectors) without a helper of the training."""
    features = vqgan.encoder(2 * pixels - 1)
    z = features / features.norm(dim=1, keepdim=True)
    book = vqgan.quantizer.embedding.weight
    book = book / book.norm(dim=1, keepdim=True)
    nearest = torch.einsum("ndhw,kd->nkhw", z, book).argmax(1)  # of unit length
    vectors = book[nearest].permute(0, 3, 1, 2)
    straight = z + (vectors - z).detach()
    return (vqgan.decoder(straight if quantized else z) + 1) / 2, z, vectors


@pytest.mark.parametrize("step", [2, 12])  # before codes are used, and after
@pytest.mark.parametrize("seen", [False, True])
def test_the_loss_of_a_vqgan_step(vqgan_state, step, seen):
    distance = CLIPDistance(micro_clip(image_size=16)) if seen else None
    state = vqgan_state(perceptual=distance)
    batch = VQGANBatch(step, state.task.batch(step).pixels)
    copies, z, vectors = plain_copies(state.task.model, batch.pixels, step >= 0.2 * STEPS)
    gap = copies - batch.pixels
    expected = gap.abs().mean() + 5 * (gap * gap).mean()
    if seen:
        expected = expected + 0.1 * distance(copies, batch.pixels)
    if step >= 0.2 * STEPS:
        expected = expected + 1.25 * ((z - vectors) ** 2).mean()
    assert state.task.loss(batch)[0].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("kind", ["fixed", "adaptive"])
def test_the_losses_of_a_vqgan_step_with_a_gan(vqgan_state, kind):
    state = vqgan_state(gan=0.5, gan_weight=kind, gan_start=0.5)
    task, start, warmup = state.task, 20, 6  # a third of the steps that are left
    batch = VQGANBatch(start + 3, task.batch(start + 3).pixels)
    copies, z, vectors = plain_copies(task.model, batch.pixels, True)
    gap, last = copies - batch.pixels, task.model.decoder.final[-1].weight
    others = gap.abs().mean() + 5 * (gap * gap).mean()
    gan = -task.discriminator(2 * copies - 1).mean()  # real is above, fake below
    weight = 0.5 * 3 / warmup
    if kind == "adaptive":
        lengths = [torch.autograd.grad(x, last, retain_graph=True)[0].norm() for x in (others, gan)]
        weight = weight * lengths[0] / (lengths[1] + 1e-4)
    expected = others + weight * gan + 1.25 * ((z - vectors) ** 2).mean()
    loss, values = state.parts["model"].loss(batch)
    assert values["gan"].item() == pytest.approx(gan.item(), rel=1e-4)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
    loss.backward()
    assert all(p.grad is None and p.requires_grad for p in task.discriminator.parameters())
    real, fake = (task.discriminator(2 * x.detach() - 1) for x in (batch.pixels, copies))
    expected = 0.5 * ((1 - real).clamp(min=0).mean() + (1 + fake).clamp(min=0).mean())
    found = state.parts["discriminator"].loss(batch)[0]
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_discriminator_learns_real_from_fake(vqgan_state):
    state = vqgan_state(gan=1.0, gan_start=0.0, gan_weight="adaptive", lr=3e-3, warmup=1)
    batch = keep_batch(state)
    batch.step = STEPS
    gan, model = state.task.discriminator, state.parts.pop("model")

    def realness(pixels):
        with torch.no_grad():
            return gan(2 * pixels - 1).mean().item()

    model.loss(batch)  # makes the copies
    for step in range(STEPS):
        state.step(step)
    assert realness(batch.pixels) > 0.3 > -0.3 > realness(state.task.copies)


def test_the_discriminator_begins_when_it_should(vqgan_state):
    state = vqgan_state(gan=0.02, gan_start=0.5)
    before = copy.deepcopy(state.task.discriminator.state_dict())
    keep_batch(state).step = STEPS // 2
    logged = [state.step(step) for step in (STEPS // 2 - 1, STEPS // 2)]
    assert ["discriminator" in values for values in logged] == [False, True]
    assert not all(torch.equal(v, before[k])
                   for k, v in state.task.discriminator.state_dict().items())


def test_a_vqgan_learns_a_batch_by_heart(vqgan_state):
    state = vqgan_state(steps=150, lr=5e-3, warmup=5)
    batch = keep_batch(state)
    first = state.step(0)["l1"].item()
    for step in range(1, 150):
        batch.step = step
        last = state.step(step)
    assert first > 0.2 and last["l1"] < 0.05 and last["l2"] < 0.01
    with torch.no_grad():  # through codes alone, as it will be used
        model = state.task.model.eval()
        assert (model.decode(model.encode(batch.pixels)) - batch.pixels).abs().mean() < 0.05


# CLIP


def test_a_discriminator_begins_at_its_share_of_the_steps_that_are_planned(vqgan_state):
    """Its own steps and its part in the loss begin together, also where the plan has changed."""
    state = vqgan_state(steps=40, gan=1.0, gan_start=0.5)
    state.plan(24)
    begun = [("discriminator" in (values := state.step(step)), "gan" in values)
             for step in range(24)]
    assert begun == [(False, False)] * 12 + [(True, True)] * 12
    assert vqgan_state(steps=40, gan=0.0).task.gan_start == 40


def test_batches_go_on_beyond_the_steps_that_were_planned(clip_state):
    """As those of a run that was planned as long."""
    short, long = (clip_state(steps=steps).task.loader for steps in (5, 30))
    for step in range(30):
        assert all(map(torch.equal, short(step), long(step)))


def test_the_loss_of_a_clip_step(clip_state):
    state = clip_state()
    batch = state.task.batch(0)
    model = copy.deepcopy(state.task.model.model)
    image = F.normalize(model.encode_image(batch.pixels), dim=1)
    text = F.normalize(model.encode_text(batch.tokens), dim=1)
    logits = (math.exp(model.logit_scale.item()) * image @ text.T).double().tolist()
    nats = []
    for i in range(BATCH):  # the image among texts, and the text among images
        for row in (logits[i], [logits[j][i] for j in range(BATCH)]):
            nats.append(math.log(sum(map(math.exp, row))) - row[i])
    assert state.task.loss(batch)[0].item() == pytest.approx(sum(nats) / len(nats), rel=1e-4)


def test_clip_receives_an_image_moved_a_little_and_one_of_its_captions(clip_state, images):
    state = clip_state()
    task, lines = state.task, set()
    for step in range(10):
        index, views = task.loader(step)
        task.loader.next = -1  # let the batch ask for the same
        batch = task.batch(step)
        for i, view, pixels, tokens in zip(index.tolist(), views, batch.pixels, batch.tokens,
                                           strict=True):
            own = [line for line in images.captions(i) if torch.equal(task.tokens[line], tokens)]
            assert own
            lines.add((i, own[0]))
            plain = task.model.preprocess(view[None].float() / 255)[0]
            middle, moved = plain[:, 3:-3, 3:-3], pixels[:, 3:-3, 3:-3]
            moves = [plain[:, 3 + y:29 + y, 3 + x:29 + x] for y in range(-3, 4)
                     for x in range(-3, 4)]
            assert middle.shape == moved.shape == moves[0].shape
            assert any(torch.allclose(moved, each, atol=1e-5) for each in moves)
    assert len({i for i, _ in lines}) < len(lines)  # not always the same caption


def test_a_clip_learns_a_batch_by_heart(clip_state):
    state = clip_state(steps=40, lr=3e-3, warmup=5)
    batch = keep_batch(state)
    rows = [(pixels.tolist(), tokens.tolist())
            for pixels, tokens in zip(batch.pixels, batch.tokens, strict=True)]
    keep = [j for j, row in enumerate(rows)  # equal images or captions cannot be told apart
            if not any(row[0] == other[0] or row[1] == other[1] for other in rows[:j])]
    batch.pixels, batch.tokens = batch.pixels[keep], batch.tokens[keep]
    losses = [state.step(step)["loss"].item() for step in range(40)]
    assert len(keep) > 4 and losses[0] > 1 and losses[-1] < 0.05
    with torch.no_grad():
        image, text, _ = state.task.embed(batch.pixels, batch.tokens)
    assert (image @ text.T).argmax(1).tolist() == list(range(len(keep)))


# Any of them


def test_the_first_step_learns_and_the_rate_is_that_of_the_step(any_state):
    state = any_state(lr=1e-3, warmup=4)
    before = {k: v.clone() for k, v in state.task.model.named_parameters()}
    for step in range(3):
        state.step(step)
        rates = {group["lr"] for optimizer in state.parts["model"].optimizers
                 for group in optimizer.param_groups}
        assert rates == {learning_rate(step, STEPS, 1e-3, 4)}
        if step == 0:
            after = dict(state.task.model.named_parameters())
            assert min(rates) > 0
            assert sum(not torch.equal(v, after[k]) for k, v in before.items()) > 5


def test_gradients_are_clipped_and_gone_after_the_step(any_state):
    state = any_state()
    part, norms = state.parts["model"], []
    first = part.optimizers[0]
    before = first.step
    first.step = lambda: (norms.append(torch.stack([
        p.grad.norm() for p in part.module.parameters() if p.grad is not None]).norm().item()),
        before())
    whole = state.task.loss

    def steep(batch):
        loss, values = whole(batch)
        return 1e3 * loss, values

    part.loss = steep
    assert state.step(0)["gradient"] > 2
    assert norms == [pytest.approx(1, abs=1e-3)]
    assert all(p.grad is None for p in part.module.parameters())


def test_what_is_validated_is_the_average(any_state):
    state = any_state(lr=1e-3, warmup=1, ema=0.6)
    name, p = next((k, v) for k, v in state.task.model.named_parameters() if v.dim() > 1)
    expected = p.detach().clone()
    for step in range(12):
        state.step(step)
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * p.detach()
    seen = []
    state.task.validate = lambda model: seen.append(model)
    state.validate()
    weights = seen[0].state_dict()[name]
    torch.testing.assert_close(weights, expected)
    assert not torch.allclose(weights, p) and not seen[0].training


def test_biases_norms_and_vectors_do_not_decay(any_state):
    state = any_state()
    for part in state.parts.values():
        for group in (group for each in part.optimizers for group in each.param_groups):
            for p in group["params"]:
                assert (group["weight_decay"] > 0) == (p.dim() > 1)
