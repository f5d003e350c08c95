"""The bug catalogue: bugs of other projects, put into our scripts, and the law each one breaks.

    python -m pytest tests/test_bugs.py                  all of them, in half a minute
    python -m pytest tests/test_bugs.py -k softmax       those with this word in their name

Most of these bugs do not stop a program from drawing digits. So good pictures prove little. A test
that passes proves something only if it can fail. Here both are shown: the law holds for the script
as it is, and it fails when a few characters of the script are changed.

An exercise. Pick a bug from the list below, or think of one of your own. Guess which law it breaks.
Make the change in the script by hand, run the tests of that script, for example

    python -m pytest tests/test_schedule.py

and read what the failing law says. Then undo the change. If no test fails, you have found a gap.

How it works. The scripts are read as text, one of them is changed, and all are run as modules in
memory. No script is written to. The test file is run in the same way, so that it sees the changed
modules; the law is one of its functions, and is called.

A bug replaces a piece of a script by another one. In the script the piece may have other spaces and
line breaks than here, and comments in between; only the words and signs must be the same.
"""

import functools
import inspect
import itertools
import re
import sys
import tempfile
import types
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

TESTS = Path(__file__).resolve().parent
# In an order in which each finds those that it imports.
COPIED = [*(TESTS.parent / f"{name}.py" for name in "schedule unet train sample plots".split()),
          TESTS / "strategies.py"]


class Bug(NamedTuple):
    name: str
    script: str
    old: str  # a piece of the script, which stands in it exactly once
    new: str  # what the bug makes of it, indented as a docstring is
    law: str  # the test that fails, file::function
    seen: str  # where it was found: repositories at GitHub, with the issue or pull request if any


BUGS = [
    # ------------------------------------------------------------------------------ the schedule
    Bug("phantom_beta_0", "schedule.py",
        "torch.zeros(1, dtype=torch.float64), betas", "betas[:1], betas",
        "test_schedule.py::test_index_is_the_subscript_of_the_papers",
        "cloneofsimo/minDiffusion, TeaPearce/Conditional_Diffusion_MNIST"),
    Bug("beta_indexed_one_late", "schedule.py",
        "beta_end, T, dtype=torch.float64)", "beta_end, T + 1, dtype=torch.float64)[1:]",
        "test_schedule.py::test_index_is_the_subscript_of_the_papers",
        "cloneofsimo/minDiffusion, AmartyaCSB/ComputerVisionProjects"),
    Bug("noised_one_level_too_far", "schedule.py",
        "self.alpha_bar[self._check(t, lowest)]",
        "self.alpha_bar[(self._check(t, lowest) + 1).clamp(max=self.T)]",
        "test_schedule.py::test_closed_form_equals_iterated_noising",
        "CompVis/stable-diffusion#533, labmlai/annotated_deep_learning_paper_implementations"),
    Bug("alpha_bar_padded_on_the_wrong_side", "schedule.py",
        "betas * (1 - self.alpha_bar[:-1])",
        "betas * (1 - torch.nn.functional.pad(self.alpha_bar[1:-1], (0, 1), value=1.0))",
        "test_schedule.py::test_posterior_variance_lies_between_zero_and_beta",
        "lucidrains/denoising-diffusion-pytorch#18"),
    Bug("last_step_ends_at_beta_1", "schedule.py",
        "v_prev = 1 - self.alpha_bar[t_prev]", "v_prev = 1 - self.alpha_bar[t_prev.clamp(min=1)]",
        "test_schedule.py::test_posterior_variance_lies_between_zero_and_beta",
        "lllyasviel/ControlNet#587"),
    Bug("beta_without_square_root", "schedule.py",
        "self.beta[t].sqrt()", "self.beta[t]",
        "test_schedule.py::test_closed_form_equals_iterated_noising",
        "acids-ircam/diffusion_models, juraam/stable-diffusion-from-scratch#3"),
    Bug("alpha_for_alpha_bar", "schedule.py",
        "self.alpha_bar[self._check(t, lowest)]", "self.alpha[self._check(t, lowest)]",
        "test_schedule.py::test_closed_form_equals_iterated_noising",
        "yang-song/score_sde_pytorch#73"),
    Bug("alpha_bar_for_alpha", "schedule.py",
        "alpha.sqrt() * v_prev", "self.alpha_bar[t].sqrt() * v_prev",
        "test_schedule.py::test_posterior_leads_back_into_the_forward_process",
        "acids-ircam/diffusion_models, luost26/diffab#26"),
    Bug("noise_multiplied_by_the_image", "schedule.py",
        "signal * x0 + noise * eps", "signal * x0 + noise * x0 * eps",
        "test_schedule.py::test_closed_form_equals_iterated_noising",
        "blt2114/twisted_diffusion_sampler#3"),
    Bug("cosine_not_squared", "schedule.py",
        "math.pi / 2) ** 2", "math.pi / 2)",
        "test_schedule.py::test_cosine_follows_the_squared_cosine",
        "lilianweng/lilianweng.github.io#9"),
    Bug("factor_per_row_not_per_image", "schedule.py",
        "value.reshape(-1, *ones)", "value",
        "test_schedule.py::test_each_image_has_its_own_t",
        "jolibrain/joliGEN#527, IrisRainbowNeko/HCP-Diffusion#82"),
    Bug("beta_of_one_or_more_accepted", "schedule.py",
        "(1 - betas > 0) & (1 - betas < 1)", "betas > 0",
        "test_schedule.py::test_schedules_that_cannot_work_are_refused",
        "lucidrains/imagen-pytorch#161"),
    Bug("few_steps_leave_the_image_visible", "schedule.py",
        "MAX_SIGNAL = 0.02", "MAX_SIGNAL = 1.0",
        "test_schedule.py::test_schedules_that_cannot_work_are_refused",
        "huggingface/blog (annotated-diffusion.md), TeaPearce/Conditional_Diffusion_MNIST"),

    # ------------------------------------------------------------------------------- the network
    Bug("softmax_over_the_queries", "unet.py",
        ".softmax(dim=-1)", ".softmax(dim=-2)",
        "test_unet.py::test_attention_weights_are_averages",
        "labmlai/annotated_deep_learning_paper_implementations#146"),
    Bug("norm_created_but_not_applied", "unet.py",
        "normed = self.norm(x)", "normed = x",
        "test_unet.py::test_attention_equals_plain_loops",
        "labmlai/annotated_deep_learning_paper_implementations"),
    Bug("attention_scores_not_scaled", "unet.py",
        "(score / math.sqrt(q.shape[-1]))", "score",
        "test_unet.py::test_attention_equals_plain_loops",
        "Project-MONAI/GenerativeModels#146"),
    Bug("heads_and_places_scrambled", "unet.py",
        'rearrange(received, "b head (h w) d -> b (head d) h w", h=x.shape[2])',
        "received.reshape(x.shape)",
        "test_unet.py::test_attention_equals_plain_loops",
        "jsbaan/transformer-from-scratch#6"),
    Bug("t_divided_by_T", "unet.py",
        "t.float()[:, None]", "t.float()[:, None] / 1000",
        "test_unet.py::test_embeddings_of_all_t_are_apart",
        "ArchiMickey/Just-a-DiT#9, sihyun-yu/REPA#40"),
    Bug("t_ignored", "unet.py",
        "self.time_mlp(embedding)", "self.time_mlp(torch.zeros_like(embedding))",
        "test_unet.py::test_t_matters",
        "cloneofsimo/minDiffusion"),
    Bug("sines_and_cosines_by_image", "unet.py",
        "torch.cat([angle.sin(), angle.cos()], dim=1)",
        "torch.stack([(torch.cos if i % 2 else torch.sin)(row.repeat(2)) "
        "for i, row in enumerate(angle)])",
        "test_unet.py::test_images_of_a_batch_do_not_see_each_other",
        "gmongaras/Diffusion_models_from_scratch#10"),
    Bug("residual_block_without_residual", "unet.py",
        "return x + self.conv2(F.silu(h))", "return self.conv2(F.silu(h))",
        "test_unet.py::test_network_is_its_drawing",
        "yilundu/improved_contrastive_divergence#7"),

    Bug("no_label_is_the_last_class", "unet.py",
        "F.embedding(label + 1, with_none)", "self.table[label]",
        "test_unet.py::test_image_without_a_label_is_answered_as_if_there_were_no_labels",
        "chainer/chainer#2730"),

    # ---------------------------------------------------------------------------------- training
    Bug("data_from_0_to_1", "train.py",
        "images.float() / 127.5 - 1", "images.float() / 255",
        "test_train.py::test_bytes_and_floats_convert_into_each_other",
        "labmlai/annotated_deep_learning_paper_implementations, DeweiHu/OCT_DDPM#3"),
    Bug("data_from_minus_half_to_half", "train.py",
        "images.float() / 127.5 - 1", "images.float() / 255 - 0.5",
        "test_train.py::test_bytes_and_floats_convert_into_each_other",
        "cloneofsimo/minDiffusion#11"),
    Bug("digits_mirrored", "train.py",
        "training_step(run, from_uint8(batch.images)",
        "training_step(run, from_uint8(batch.images).flip(-1)",
        "test_train.py::test_steps_are_those_of_the_algorithm",
        "chrischute/real-nvp#5"),
    Bug("last_t_never_trained", "train.py",
        "/ count * T).long()", "/ count * (T - 1)).long()",
        "test_train.py::test_draws_of_t_have_one_in_each_stratum",
        "TeaPearce/Conditional_Diffusion_MNIST#4, lucidrains/imagen-pytorch#265"),
    Bug("first_t_never_trained", "train.py",
        "(1 + (stratum + within) / count * T)", "(2 + (stratum + within) / count * (T - 1))",
        "test_train.py::test_draws_of_t_have_one_in_each_stratum",
        "dome272/Diffusion-Models-pytorch"),
    Bug("t_beyond_T", "train.py",
        ".long().clamp(max=T)", ".long()",
        "test_train.py::test_greatest_draw_of_t_is_T",
        "TencentARC/T2I-Adapter#126"),
    Bug("uniform_noise", "train.py",
        "eps = torch.randn(x0.shape, generator=run.generator, dtype=x0.dtype)",
        "eps = torch.rand(x0.shape, generator=run.generator, dtype=x0.dtype)",
        "test_train.py::test_steps_are_those_of_the_algorithm",
        "acids-ircam/diffusion_models#8"),
    Bug("loss_against_the_noisy_image", "train.py",
        "F.mse_loss(eps_hat, eps.to(run.device))", "F.mse_loss(eps_hat, xt.to(run.device))",
        "test_train.py::test_steps_are_those_of_the_algorithm",
        "irom-princeton/dppo#14"),
    Bug("gradients_never_reset", "train.py",
        "run.adam.zero_grad()", "pass",
        "test_train.py::test_steps_are_those_of_the_algorithm",
        "facebookresearch/nwm#16"),
    Bug("gradient_clipped_after_the_step", "train.py",
        """
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.clip)
        run.adam.param_groups[0]["lr"] = run.learning_rate(run.step, run.steps, run.config)
        run.adam.step()
        """,
        """
        run.adam.param_groups[0]["lr"] = run.learning_rate(run.step, run.steps, run.config)
        run.adam.step()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.clip)
        """,
        "test_train.py::test_steps_are_those_of_the_algorithm",
        "jongwook/onsets-and-frames#24"),
    Bug("first_step_at_rate_zero", "train.py",
        "(step + 1) / rising_steps", "step / rising_steps",
        "test_train.py::test_learning_rate_rises_then_falls",
        "karpathy/nanoGPT#443"),
    Bug("average_without_warm_up", "train.py",
        "decay = min(decay, (1 + step) / (10 + step))", "decay = 0.9999",
        "test_train.py::test_average_equals_its_closed_form",
        "openai/improved-diffusion#59, konpatp/diffae#16"),
    Bug("average_decays_with_the_number_of_epochs", "train.py",
        "run.step, run.config.ema)", "run.step, max(0, 1 - 1 / run.config.epochs))",
        "test_train.py::test_steps_are_those_of_the_algorithm",
        "bot66/MNISTDiffusion"),
    Bug("average_backwards", "train.py",
        "mean.lerp_(weight, 1 - decay)", "mean.lerp_(weight, decay)",
        "test_train.py::test_average_equals_its_closed_form",
        "marin-community/levanter#883"),
    Bug("training_goes_on_from_the_average", "train.py",
        'save(out / "model.pt", model)',
        """
        save(out / "model.pt", model)
        run.model.load_state_dict(run.average.state_dict())
        """,
        "test_train.py::test_steps_are_those_of_the_algorithm",
        "harubaru/waifu-diffusion#31, huggingface/diffusers#2321"),
    Bug("model_file_without_the_average", "train.py",
        "for k, v in self.average.state_dict().items()",
        "for k, v in self.model.state_dict().items()",
        "test_train.py::test_steps_are_those_of_the_algorithm",
        "huggingface/diffusers#1818"),
    Bug("left_in_eval_mode", "train.py",
        "model.train(was_training)", "pass",
        "test_train.py::test_evaluate_equals_a_plain_loop",
        "ermongroup/ncsn#2"),
    Bug("file_overwritten_in_place", "train.py",
        'part = path.with_name(path.name + ".part")', "part = path",
        "test_train.py::test_failed_save_leaves_the_old_file",
        "Lightning-AI/pytorch-lightning#688"),
    Bug("generator_not_restored", "train.py",
        'self.generator.set_state(state["generator"])', "pass",
        "test_train.py::test_killed_run_goes_on_from_its_last_file",
        "karpathy/nanoGPT#467, ai2cm/ace#690"),
    Bug("adam_starts_afresh_on_resume", "train.py",
        'self.adam.load_state_dict(state["adam"])', "pass",
        "test_train.py::test_killed_run_goes_on_from_its_last_file",
        "bot66/MNISTDiffusion, explainingai-code/DDPM-Pytorch"),
    Bug("average_lost_on_resume", "train.py",
        'self.average.load_state_dict(state["average"])', "pass",
        "test_train.py::test_killed_run_goes_on_from_its_last_file",
        "ai2cm/ace#349, Vchitect/Latte#55"),
    Bug("resumed_one_step_too_far", "train.py",
        'self.step = len(self.history["step_loss"])',
        'self.step = len(self.history["step_loss"]) + 1',
        "test_train.py::test_killed_run_goes_on_from_its_last_file",
        "crowsonkb/k-diffusion"),
    Bug("shuffled_anew_on_resume", "train.py",
        'self.order = state["order"]',
        "self.order = torch.randperm(self.image_count, generator=self.generator)",
        "test_train.py::test_resumed_run_equals_unbroken_run_bit_for_bit",
        "huggingface/accelerate#4195"),
    Bug("stopped_run_not_saved", "train.py",
        "run.epoch_is_complete or halt", "run.epoch_is_complete",
        "test_train.py::test_run_stops_and_is_saved_if_the_caller_says_so",
        "huggingface/nanotron#21, coqui-ai/Trainer#99"),
    Bug("early_state_of_the_step_before", "train.py",
        'max(plan["step"] + 1, round(EARLY * plan["steps"]))',
        'max(plan["step"] + 1, round(EARLY * plan["steps"]) - 1)',
        "test_train.py::test_early_state_is_that_of_two_fifteenths_of_the_steps",
        "NVIDIA-NeMo/Speech#12284, marin-community/marin#7166"),
    Bug("every_process_takes_the_same_images", "train.py",
        "rows[first::process_count()]", "rows[::process_count()]",
        "test_train.py::test_shares_of_all_processes_make_up_the_batch",
        "Shark-NLP/DiffuSeq#37, SalesforceAIResearch/DiffusionDPO#15"),

    Bug("labels_dropped_for_the_whole_batch", "train.py",
        "torch.rand(label.shape, generator=generator, dtype=torch.float32) < DROPPED",
        "torch.rand(1, generator=generator) < DROPPED",
        "test_train.py::test_labels_are_dropped_one_by_one_with_probability_a_tenth",
        "dome272/Diffusion-Models-pytorch, runwayml/stable-diffusion#8"),
    Bug("labels_kept_where_they_should_be_dropped", "train.py",
        "torch.rand(label.shape, generator=generator, dtype=torch.float32) < DROPPED",
        "torch.rand(label.shape, generator=generator, dtype=torch.float32) > DROPPED",
        "test_train.py::test_labels_are_dropped_one_by_one_with_probability_a_tenth",
        "TeaPearce/Conditional_Diffusion_MNIST#1"),
    Bug("labels_never_dropped", "train.py",
        "label = drop_labels(label, run.generator)", "pass",
        "test_train.py::test_network_is_told_the_labels_of_its_images_or_none",
        "NVlabs/Sana#188, lucidrains/DALLE2-pytorch#235"),
    Bug("images_shuffled_but_not_their_labels", "train.py",
        "Examples(self.images[rows], self.labels[rows])",
        "Examples(self.images[rows], self.labels[:len(self.images[rows])])",
        "test_train.py::test_network_is_told_the_labels_of_its_images_or_none",
        "Borda/kaggle_image-classify#12, xudonmao/VMT#1"),

    # ---------------------------------------------------------------------------------- sampling
    Bug("noise_in_the_last_step", "sample.py",
        "torch.where(beta_tilde > 0, beta.reshape(beta_tilde.shape), 0)",
        "beta.reshape(beta_tilde.shape)",
        "test_sample.py::test_last_step_ignores_the_noise",
        "labmlai/annotated_deep_learning_paper_implementations, acids-ircam/diffusion_models"),
    Bug("square_root_of_a_logarithm", "sample.py",
        "beta.reshape(beta_tilde.shape)", "beta.reshape(beta_tilde.shape).log()",
        "test_sample.py::test_unclipped_mean_is_the_papers",
        "huggingface/diffusers#14569"),
    Bug("predicted_noise_for_fresh_noise", "sample.py",
        "sigma2.sqrt() * noise", "sigma2.sqrt() * eps_hat",
        "test_sample.py::test_unclipped_mean_is_the_papers",
        "IDEALLab/EngiOpt#66"),
    Bug("beta_of_a_short_step_in_a_long_one", "sample.py",
        "schedule.step_beta(t, t_prev).to(xt", "schedule.step_beta(t).to(xt",
        "test_sample.py::test_long_steps_are_steps_of_the_respaced_schedule",
        "huggingface/diffusers#3006"),
    Bug("long_step_ends_at_t_minus_1", "sample.py",
        "schedule.q_posterior(x0_hat, xt, t, t_prev)", "schedule.q_posterior(x0_hat, xt, t)",
        "test_sample.py::test_long_steps_are_steps_of_the_respaced_schedule",
        "huggingface/diffusers#2076"),
    Bug("clip_computed_but_not_used", "sample.py",
        "schedule.q_posterior(x0_hat, xt, t, t_prev)",
        "schedule.q_posterior(schedule.predict_x0(xt, t, eps_hat), xt, t, t_prev)",
        "test_sample.py::test_clipping_bounds_a_wild_network",
        "explainingai-code/DDPM-Pytorch, w86763777/pytorch-ddpm#9"),
    Bug("no_clip_at_all", "sample.py",
        "x0_hat.clamp(-1, 1) if clip else x0_hat", "x0_hat",
        "test_sample.py::test_clipping_bounds_a_wild_network",
        "dome272/Diffusion-Models-pytorch#20"),
    Bug("chain_stops_before_0", "sample.py",
        "range(steps, -1, -1)", "range(steps, 0, -1)",
        "test_sample.py::test_fewer_steps_run_from_T_to_0",
        "cloneofsimo/minDiffusion"),
    Bug("stride_that_misses_T", "sample.py",
        "round(T * k / steps)", "k * (T // steps)",
        "test_sample.py::test_fewer_steps_run_from_T_to_0",
        "huggingface/diffusers#5921, huggingface/diffusers#9384"),
    Bug("end_of_a_step_by_a_fixed_stride", "sample.py",
        "for t, t_prev in zip(levels[:-1], levels[1:]):",
        """
        for t in levels[:-1]:
            t_prev = max(0, t - T // (len(levels) - 1))
        """,
        "test_sample.py::test_sampled_chain_keeps_the_marginals_of_a_point",
        "huggingface/diffusers#9261, huggingface/diffusers#12633"),
    Bug("network_told_the_step_not_the_level", "sample.py",
        "torch.full((len(xt),), t, device=device)",
        "torch.full((len(xt),), len(levels) - 1 - levels.index(t), device=device)",
        "test_sample.py::test_sampled_chain_keeps_the_marginals_of_a_point",
        "Stability-AI/stablediffusion#226"),
    Bug("one_generator_for_the_batch", "sample.py",
        "[torch.Generator().manual_seed(seed) for seed in seeds]",
        "[torch.Generator().manual_seed(seeds[0])] * len(seeds)",
        "test_sample.py::test_image_depends_on_its_seed_alone",
        "huggingface/diffusers#6233, AUTOMATIC1111/stable-diffusion-webui#376"),
    Bug("first_fresh_noise_is_that_of_x_T", "sample.py",
        "xt = draw_noise(generators, shape).to(device)",
        """
        xt = draw_noise(generators, shape).to(device)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        """,
        "test_sample.py::test_chain_is_its_steps_with_the_noise_of_the_seed",
        "Kosinkadink/ComfyUI-AnimateDiff-Evolved#532, Comfy-Org/ComfyUI#9819"),
    Bug("sampled_in_training_mode", "sample.py",
        "model.eval()", "pass",
        "test_sample.py::test_sampling_is_in_eval_mode_without_gradients_and_leaves_the_mode",
        "labmlai/annotated_deep_learning_paper_implementations, huggingface/lerobot#35"),
    Bug("gradients_kept_while_sampling", "sample.py",
        "@torch.no_grad() def sample(", "def sample(",
        "test_sample.py::test_sampling_is_in_eval_mode_without_gradients_and_leaves_the_mode",
        "TeaPearce/Conditional_Diffusion_MNIST#12"),
    Bug("ddim_without_square_root", "sample.py",
        "math.sqrt(1 - fresh) * eps_hat", "(1 - fresh) * eps_hat",
        "test_sample.py::test_ddim_step_is_the_papers",
        "mathpluscode/ImgX-DiffSeg#4"),
    Bug("ddim_eta_not_squared", "sample.py",
        "fresh = eta**2 *", "fresh = eta *",
        "test_sample.py::test_ddim_step_is_the_papers",
        "inbarhub/DDPM_inversion#12"),
    Bug("ddim_one_level_too_low", "sample.py",
        "q_sample(x0_hat, t_prev, eps)", "q_sample(x0_hat, max(t_prev - 1, 0), eps)",
        "test_sample.py::test_ddim_step_is_the_papers",
        "lucidrains/denoising-diffusion-pytorch#81"),
    Bug("ddim_image_clipped_but_not_the_noise", "sample.py",
        """
        x0_hat = predict_clean(schedule, xt, t, eps_hat, clip)
        return noise_again(schedule, xt, t, x0_hat, noise, t_prev, eta)
        """,
        """
        x0_hat = schedule.predict_x0(xt, t, eps_hat)
        x_prev = noise_again(schedule, xt, t, x0_hat, noise, t_prev, eta)
        cut = predict_clean(schedule, xt, t, eps_hat, clip) - x0_hat
        return x_prev + schedule.alpha_bar[t_prev].sqrt() * cut
        """,
        "test_sample.py::test_ddim_puts_back_the_noise_that_clipping_leaves",
        "lucidrains/denoising-diffusion-pytorch#84"),
    Bug("solver_extrapolates_in_the_last_step", "sample.py",
        "previous is not None and t_prev > 0", "previous is not None",
        "test_sample.py::test_certainty_leads_straight_there",
        "huggingface/diffusers#9007"),
    Bug("solver_remembers_the_chain_before", "sample.py",
        "if previous is not None and t_prev > 0:",
        """
        previous = previous or vars(dpm_step).get("memory")
        dpm_step.memory = t, x0_hat
        if previous is not None and t_prev > 0:
        """,
        "test_sample.py::test_chain_does_not_know_of_the_one_before",
        "huggingface/diffusers#6631, huggingface/diffusers#8711"),
    Bug("guidance_counted_from_0", "sample.py",
        "eps_hat = eps_worse + self.guidance * (eps_model - eps_worse)",
        "eps_hat = eps_model + self.guidance * (eps_model - eps_worse)",
        "test_sample.py::test_guidance_of_1_is_the_model_and_of_0_the_worse_network",
        "threestudio-project/threestudio#127, huggingface/diffusers#5882, "
        "lucidrains/denoising-diffusion-pytorch#155"),
    Bug("model_and_guide_swapped", "sample.py",
        "eps_hat = eps_worse + self.guidance * (eps_model - eps_worse)",
        "eps_hat = eps_model + self.guidance * (eps_worse - eps_model)",
        "test_sample.py::test_guidance_removes_a_mistake_that_both_share",
        "Nerogar/OneTrainer#775, threestudio-project/threestudio#113"),
    Bug("answers_with_and_without_label_swapped", "sample.py",
        "told, untold = eps_hat.chunk(2)", "untold, told = eps_hat.chunk(2)",
        "test_sample.py::test_guidance_by_labels_is_the_formula_of_the_paper",
        "Nerogar/OneTrainer#775, threestudio-project/threestudio#113"),
    Bug("labels_repeated_in_another_order_than_images", "sample.py",
        "torch.cat([self.labels, torch.full_like(self.labels, -1)])",
        "torch.stack([self.labels, torch.full_like(self.labels, -1)], dim=1).flatten()",
        "test_sample.py::test_guidance_by_labels_is_the_formula_of_the_paper",
        "huggingface/diffusers#9215, huggingface/diffusers#12306"),
    Bug("guidance_taken_for_that_of_the_paper", "sample.py",
        "Guided(Labelled(checkpoint.model, labels), checkpoint.model, guidance, interval)",
        "Guided(Labelled(checkpoint.model, labels), checkpoint.model, guidance - 1, interval)",
        "test_sample.py::test_command_guides_digits",
        "tzco/Diffusion-wo-CFG#7"),
    Bug("guidance_outside_the_interval", "sample.py",
        "torch.where(inside.reshape(-1, 1, 1, 1), eps_hat, eps_model)",
        "torch.where(inside.reshape(-1, 1, 1, 1), eps_model, eps_hat)",
        "test_sample.py::test_interval_bounds_where_guidance_acts",
        "ZitengWangNYU/Scale-RAE#7"),
    Bug("guidance_never_comes_back", "sample.py",
        "if not inside.any():",
        """
        if not inside.any():
            self.guidance = 1
        if not inside.any():
        """,
        "test_sample.py::test_guided_chain_mixes_the_two_predictions_in_every_step",
        "bytedance/mammothmoda#30"),
    Bug("guidance_after_clipping", "sample.py",
        "eps_hat = model(xt, torch.full((len(xt),), t, device=device))",
        """
        level = torch.full((len(xt),), t, device=device)
        eps_hat = model(xt, level)
        if isinstance(model, Guided):
            x0_model, x0_worse = (predict_clean(schedule, xt, t, part(xt, level), clip)
                                  for part in (model.model, model.worse))
            mixed = x0_worse + model.guidance * (x0_model - x0_worse)
            if model.interval is None or model.interval[0] <= t <= model.interval[1]:
                eps_hat = schedule.predict_eps(xt, t, mixed)
        """,
        "test_sample.py::test_guided_chain_mixes_the_two_predictions_in_every_step",
        "kwsong0113/diffusion-forcing-transformer#35"),
    Bug("bytes_wrap_around", "sample.py",
        ".clamp(0, 255).to(torch.uint8)", ".to(torch.int64).to(torch.uint8)",
        "test_train.py::test_to_uint8_rises_and_saturates",
        "huggingface/blog (annotated-diffusion.md)"),
    Bug("bytes_cut_off_not_rounded", "sample.py",
        ".round().clamp(0, 255)", ".clamp(0, 255)",
        "test_train.py::test_to_uint8_rises_and_saturates",
        "pytorch/vision#8141, AUTOMATIC1111/stable-diffusion-webui#14504"),
]

# What a broken law raises: of an assert, of pytest.raises if nothing was raised, or for want of a
# file that should be there. Any other error, a NameError say, would be a slip in the list above.
BROKEN = (AssertionError, pytest.fail.Exception, FileNotFoundError)

# Hypothesis: enough examples for each bug, the same every time, and no search for simpler ones.
EXAMPLES = dict(max_examples=100, derandomize=True, database=None, deadline=None,
                phases=[Phase.explicit, Phase.generate], suppress_health_check=list(HealthCheck))


def put_into(text: str, bug: Bug) -> str:
    """The text of a script, with the bug in it."""
    # Between two words or signs of the piece there may be white space and comments in the script.
    words_and_signs = re.findall(r"\w+|\S", bug.old)
    between = r"(?:\s|#.*\n)*"
    pattern = between.join(re.escape(word) for word in words_and_signs)
    places = list(re.finditer(pattern, text))
    assert len(places) == 1, (
        f"{bug.script} has changed: {bug.old!r} is in it {len(places)} times, not once; "
        f"update the bug {bug.name} in tests/test_bugs.py")

    # Further lines of the new piece are indented like the line in which the old one begins.
    first, end = places[0].span()
    line = text[:first].rpartition("\n")[2]
    indentation = re.match(" *", line)[0]
    new = inspect.cleandoc(bug.new).replace("\n", "\n" + indentation)
    return text[:first] + new + text[end:]


def source(path: Path, bug: Bug | None) -> str:
    """The text of a file, with the bug in it if it is the script that has the bug."""
    text = path.read_text(encoding="utf-8")
    if bug is not None and bug.script == path.name:
        text = put_into(text, bug)
    return text


@contextmanager
def copies(law: str, bug: Bug | None = None):
    """Yield the law, a function of a test file that sees fresh copies of all scripts."""
    file, function = law.split("::")
    usual = settings.default
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        settings.register_profile("bugs", **EXAMPLES)
        settings.load_profile("bugs")  # @given takes it over when the test file is run
        try:
            for path in [*COPIED, TESTS / file]:
                module = types.ModuleType(path.stem)
                module.__file__ = str(path)
                patch.setitem(sys.modules, path.stem, module)  # for those that import it
                exec(compile(source(path, bug), path, "exec"), vars(module))
            yield getattr(module, function)
        finally:
            settings.register_profile("usual", usual)
            settings.load_profile("usual")


def parameters_of(mark) -> list[dict]:
    """The rows of a mark pytest.mark.parametrize, each as name -> value."""
    names = mark.args[0].split(", ")
    rows = []
    for row in mark.args[1]:
        values = row if len(names) > 1 else [row]
        rows.append(dict(zip(names, values)))
    return rows


def call(law) -> None:
    """Call a test function as pytest does: with each of its parameters, in a folder of its own."""
    marks = getattr(law, "pytestmark", [])
    tables = [parameters_of(mark) for mark in marks if mark.name == "parametrize"]
    for rows in itertools.product(*tables):
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            arguments = {}
            for row in rows:
                arguments.update(row)
            for name, fixture in (("tmp_path", Path(folder)), ("monkeypatch", patch)):
                if name in inspect.signature(law).parameters:
                    arguments[name] = fixture
            law(**arguments)


@functools.cache
def check_without_bug(law: str) -> None:
    """Raise what the law raises on unchanged copies. Once for all bugs that share the law."""
    with copies(law) as function:
        call(function)


@pytest.mark.parametrize("bug", BUGS, ids=[bug.name for bug in BUGS])
def test_law_notices_the_bug(bug):
    """The law holds for copies of the scripts, and fails for copies of which one has the bug."""
    check_without_bug(bug.law)
    with copies(bug.law, bug) as function:
        try:
            call(function)
        except BROKEN:
            return
    pytest.fail(f"{bug.name}: {bug.law} does not notice it")


def test_catalogue_is_in_order():
    """No two bugs have one name or are the same; each law is a test, each source a repository."""
    assert len({bug.name for bug in BUGS}) == len(BUGS)
    assert len({(bug.script, bug.old, bug.new) for bug in BUGS}) == len(BUGS)
    for bug in BUGS:
        file, function = bug.law.split("::")
        assert function.startswith("test_")
        assert f"\ndef {function}(" in (TESTS / file).read_text(encoding="utf-8"), bug.law
        assert "/" in bug.seen


def test_pieces_are_found_whatever_their_line_breaks():
    """Spaces, line breaks and comments may differ; new lines are indented like the line that they
    replace. A piece that is missing, or that stands there twice, is an error that names the bug."""
    bug = Bug("name", "script.py", "f(a, b=1)", """
        g(a)
        if a:
            h(a)
        """, "", "")
    for piece in ("f(a, b=1)", "f(a,\n      b=1)", "f( a,b = 1 )", "f(a,  # the first\n  b=1)"):
        text = f"def k(a):\n    {piece}\n    return a\n"
        assert put_into(text, bug) == (
            "def k(a):\n    g(a)\n    if a:\n        h(a)\n    return a\n")
    for text in ("f(a, c=1)", "f(a, b=1); f(a, b=1)"):
        with pytest.raises(AssertionError, match="update the bug name in tests/test_bugs.py"):
            put_into(text, bug)
