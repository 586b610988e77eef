"""Hugging Face: transformers.Trainer and Accelerate."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

transformers = pytest.importorskip("transformers", reason="extra [huggingface]", exc_type=ImportError)
accelerate = pytest.importorskip("accelerate", reason="extra [huggingface]", exc_type=ImportError)

from sib_fast import EvidenceLoss, SIBLoss, prepare  # noqa: E402
from sib_fast.integrations import huggingface  # noqa: E402
from sib_fast.integrations.huggingface import SIBTrainer  # noqa: E402
from sib_fast.testing.networks import conv_net  # noqa: E402
from tests.integrations.steps import WEIGHTS, assert_same_parameters, batches_of, explicit_steps  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


class Classifier(transformers.PreTrainedModel):
    """A network in Hugging Face's dress: pixel_values and labels in, a dictionary out."""

    config_class = transformers.PretrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.body = conv_net()
        self.post_init()

    def _init_weights(self, module):
        """conv_net has made them."""

    def forward(self, pixel_values, labels=None):
        logits = self.body(pixel_values)
        out = {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), **out} if labels is not None else out


def rows_of(batches):
    return [{"pixel_values": x[i], "labels": int(target[i])} for x, target in batches for i in range(len(x))]


class InOrder(SIBTrainer):
    """Batches as they come, so that the explicit form can follow."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trainer_of(tmp_path, model, rows, criterion=None, **options):
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(tmp_path), "per_device_train_batch_size": 6, "per_device_eval_batch_size": 6, "max_steps": 2,
            "learning_rate": 0.1, "lr_scheduler_type": "constant", "optim": "sgd", "max_grad_norm": 0.0, "logging_steps": 1,
            "save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True,
            **options,
        }
    )  # fmt: skip
    return InOrder(model, arguments, train_dataset=rows, eval_dataset=rows, criterion=criterion or SIBLoss(**WEIGHTS))


@pytest.mark.filterwarnings("ignore:.*fewer than 7×7")
def test_the_trainer_with_evidence_alone(tmp_path):
    model, batches = Classifier(transformers.PretrainedConfig()), batches_of(2)
    trainer = trainer_of(tmp_path, model, rows_of(batches), EvidenceLoss("share", window_size=5))
    trainer.train()
    wanted = explicit_steps(batches, lr=0.1, criterion=EvidenceLoss("share", window_size=5))
    assert_same_parameters(model.body, wanted)
    assert any("sib/share" in line for line in trainer.state.log_history)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer_trains_as_the_explicit_form_does(accumulate, tmp_path):
    model, batches = Classifier(transformers.PretrainedConfig()), batches_of(2 * accumulate)
    trainer = trainer_of(tmp_path, model, rows_of(batches), gradient_accumulation_steps=accumulate)
    trainer.train()
    assert_same_parameters(model.body, explicit_steps(batches, lr=0.1, every=accumulate))
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == 2
    assert {"sib/loss", "sib/base", "sib/foreground", "sib/background", "sib/mask_area"} <= lines[0].keys()
    # The Trainer's own figure is the mean loss of the step, whatever the accumulation; a line's terms are that step's alone.
    for line in lines:
        assert line["loss"] == pytest.approx(line["sib/loss"], abs=1e-3)


def test_a_model_that_comes_in_eval_mode_is_trained_with_the_terms(tmp_path):
    """As from_pretrained returns it: the Trainer sets its own mode at every step."""
    model, batches = Classifier(transformers.PretrainedConfig()).eval(), batches_of(2)
    trainer_of(tmp_path, model, rows_of(batches)).train()
    assert_same_parameters(model.body, explicit_steps(batches, lr=0.1))


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_the_terms_apply_at_every_kth_step_of_the_trainers(accumulation_steps, tmp_path):
    """Whatever the accumulation, with accumulation_steps and without, and after a restart at an odd step."""
    applied = []

    class Watched(InOrder):
        def compute_loss(self, *args, **kwargs):
            out = super().compute_loss(*args, **kwargs)
            applied.append((self.state.global_step, "foreground" in self.criterion.terms))
            return out

    def fit(criterion, **options):
        model = Classifier(transformers.PretrainedConfig())
        arguments = trainer_of(
            tmp_path, model, [], gradient_accumulation_steps=2, max_steps=4, save_strategy="steps", save_steps=3
        ).args
        trainer = Watched(model, arguments, train_dataset=rows_of(batches_of(8)), criterion=criterion)
        trainer.train(**options)

    fit(SIBLoss(**WEIGHTS, every=2, accumulation_steps=accumulation_steps))
    assert [step for step, _ in applied] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(on == (step % 2 == 0) for step, on in applied)
    if accumulation_steps == 1:
        applied.clear()
        fit(SIBLoss(**WEIGHTS, every=2), resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        assert applied == [(3, False), (3, False)]


def test_evaluation_between_steps_leaves_the_logged_terms_alone(tmp_path):
    def lines(**options):
        trainer = trainer_of(tmp_path, Classifier(transformers.PretrainedConfig()), rows_of(batches_of(2)), **options)
        trainer.train()
        return [{k: v for k, v in line.items() if k.startswith("sib/")} for line in trainer.state.log_history if "loss" in line]

    assert lines() == lines(eval_strategy="steps", eval_steps=1)


def test_evaluation_sees_the_base_loss(tmp_path):
    model, batches = Classifier(transformers.PretrainedConfig()), batches_of(1)
    metrics = trainer_of(tmp_path, model, rows_of(batches)).evaluate()
    model.eval()
    with torch.no_grad():
        wanted = nn.functional.cross_entropy(model.body(batches[0][0]), batches[0][1]).item()
    assert metrics["eval_loss"] == pytest.approx(wanted, rel=1e-6)
    assert not any(name.startswith("sib/") for name in metrics)


def small_vit(attention):
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=32, image_size=32, patch_size=8,
        num_labels=5, attn_implementation=attention,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


def test_a_vision_transformer(tmp_path):
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 5} for i in range(12)]
    with pytest.raises(ValueError, match="SIBTrainer: the model's attention must be 'sib_fast' or 'eager', got 'sdpa'"):
        trainer_of(tmp_path, small_vit("sdpa"), rows)
    trained = []
    for attention in ("eager", "sib_fast"):
        torch.manual_seed(0)
        trainer = trainer_of(tmp_path, small_vit(attention), rows)
        trainer.train()
        assert trainer.criterion.terms["foreground"] > 0
        trained.append(list(trainer.model.parameters()))
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    # What is saved loads where this package is not.
    trainer.save_model(tmp_path / "saved")
    assert "sib_fast" not in (tmp_path / "saved" / "config.json").read_text()


def test_attention_that_can_be_differentiated_twice():
    """Without a mask the math kernel's numbers and derivatives; with one, or without gradients, the call of "sdpa"."""
    torch.manual_seed(0)
    composed, fast = small_vit("sdpa").double(), small_vit("sib_fast").double()
    fast.load_state_dict(composed.state_dict())
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    results = []
    for model in (composed, fast):
        kernel = SDPBackend.MATH if model is composed else SDPBackend.FLASH_ATTENTION
        leaf = x.clone().requires_grad_()
        with sdpa_kernel(kernel):
            logits = model(pixel_values=leaf).logits
        (vjp,) = torch.autograd.grad(logits.softmax(1).square().sum(), leaf, create_graph=True)
        second = torch.autograd.grad(vjp.square().sum(), list(model.parameters()), allow_unused=True)
        results.append([logits, vjp, *(t for t in second if t is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    module = type("Module", (nn.Module,), {"is_causal": False})()
    query = torch.randn(2, 3, 5, 4, requires_grad=True)
    mask = torch.zeros(2, 1, 5, 5).masked_fill(torch.eye(5).bool(), -torch.inf)
    out, weights = huggingface.attention_forward(module, query, query, query, mask)
    assert weights is None
    assert torch.equal(out, nn.functional.scaled_dot_product_attention(query, query, query, mask).transpose(1, 2))
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface, "sdpa_attention_forward", lambda *_, **options: calls.append(options))
        for option in ({"softcap": 30.0}, {"position_bias": mask}, {"output_attentions": True}):
            huggingface.attention_forward(module, query, query, query, None, **option)
            assert calls.pop().items() >= option.items()
    with torch.no_grad():
        out, _ = huggingface.attention_forward(module, query, query, query, None, scaling=0.3)
        want = nn.functional.scaled_dot_product_attention(query, query, query, scale=0.3)
    assert torch.equal(out, want.transpose(1, 2))


def test_what_would_fail_is_refused_in_words(tmp_path):
    model, rows = Classifier(transformers.PretrainedConfig()), rows_of(batches_of(1))
    with pytest.raises(TypeError, match="SIBTrainer: criterion must be a SIBLoss or an EvidenceLoss, got CrossEntropyLoss"):
        trainer_of(tmp_path, model, rows, nn.CrossEntropyLoss())
    with pytest.raises(ValueError, match=r"label_smoothing_factor must be 0, got 0\.1"):
        trainer_of(tmp_path, model, rows, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="SIBTrainer: inputs must hold 'labels'"):
        trainer_of(tmp_path, model, rows).compute_loss(model, {"pixel_values": torch.zeros(1, 3, 8, 8)})


def test_several_labels(tmp_path):
    config = transformers.PretrainedConfig(problem_type="multi_label_classification")
    multi_hot = (torch.arange(30).view(6, 5) % 3 == 0).float()
    images = batches_of(1)[0][0]
    rows = [{"pixel_values": x, "labels": y} for x, y in zip(images, multi_hot, strict=True)]
    with pytest.raises(ValueError, match="SIBTrainer: the criterion's base_loss must not be cross-entropy for problem_type"):
        trainer_of(tmp_path, Classifier(config), rows, SIBLoss(**WEIGHTS))
    arguments = trainer_of(tmp_path, Classifier(transformers.PretrainedConfig()), rows).args
    trainer = InOrder(Classifier(config), arguments, train_dataset=rows)
    trainer.train()
    assert trainer.criterion.scalar == "multilabel_energy"
    net = conv_net()
    wanted = nn.functional.binary_cross_entropy_with_logits(net(images), multi_hot).item()
    assert trainer.state.log_history[0]["sib/base"] == pytest.approx(wanted, rel=1e-5)


def test_accelerate():
    """No integration is needed: attach before `prepare`, or after it."""
    batches = batches_of(3)
    for attach_first in (True, False):
        net, accelerator = prepare(conv_net()), accelerate.Accelerator(cpu=True)
        criterion = SIBLoss(**WEIGHTS)
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1)
        if attach_first:
            criterion.attach(net)
        model, optimiser = accelerator.prepare(net, optimiser)
        if not attach_first:
            criterion.attach(model)
        for x, target in batches:
            with accelerator.accumulate(model):
                accelerator.backward(criterion(model(x), target))
                optimiser.step()
                optimiser.zero_grad()
        assert_same_parameters(accelerator.unwrap_model(model), explicit_steps(batches, lr=0.1))
