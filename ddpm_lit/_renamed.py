"""Where the public names of earlier versions are now."""

# By module ("" is the package itself): the names that moved there, and what they are called now where that has changed.
_MOVED = {
    "": """
        Learner=Trainer RECIPES=PRESETS SCHEDULES=PRESETS SIZES=PRESETS SOURCES=PRESETS TRAINING=PRESETS
        device_of=DDPM image_shape=DDPM load_state=Trainer quality=evaluate_samples save_film=save_animation
        selected=Images training_state=Trainer
    """,
    "checks": """
        report
    """,
    "gaussian": """
        bayes randn
    """,
    "forward": """
        at beta_schedule=schedule_by_name
    """,
    "posterior": """
        mean_from_x0 posterior_weights=posterior_coefficients x0_from_mean
    """,
    "ddpm": """
        PREDICTS VARIANCES first_step_patched itself one_of reverse_variance
    """,
    "bound": """
        VlbTerms decoder_term discretized_log_prob kl_term per_image prior_term
    """,
    "objective": """
        error_factor noised
    """,
    "exact": """
        Mixture Parts level
    """,
    "layers": """
        Attention Downsample Dropout GroupNorm ResidualBlock TimeEmbedding Upsample arranged=to_fast_layout
        attended=scaled_attention attention=build_attention doubled=nearest_2x frugally=run_block halved=avg_pool_2x
        plainly=run_block silu sinusoidal transposed=upsample_kernel zeroed=zero_init
    """,
    "unet": """
        ATTENDS=BLOCK_TYPES CHOICES DEFAULTS=UNET_DEFAULTS Down=DownBlock Level=DownBlock Middle=MidBlock
        NOT_BUILT=UNSUPPORTED Up=UpBlock block_of=block_config check_labels check_numbers check_words=check_keywords
        class_embedding=build_class_embedding embedding=embed_conditions initialise resizes=resizes_by_block
        steps_of=expand_timesteps way_down=build_encoder way_up=build_decoder
    """,
    "files": """
        Checkpoints DrawnParts=CachedSamples KeptParts=CachedBatches KeptSums=CachedSums MODEL_FILES
        Pictures=CachedPictures damage=find_damage fetched_file=download_checked fingerprint=model_digest
        flush=fsync_path keep_recipe=write_json model_folder move_into=atomic_folder own_parts=open_cache read_json
        remove=remove_folder save_npz signature=checksum telling_what_is_kept=note_cached whole=atomic_write
        writable_folder write_whole=atomic_folder
    """,
    "processes": """
        LIMIT=MAX_SKIPPED PRECISIONS RunLog=TrainingLog STRIDE=SEED_STRIDE Stopped accelerator_for=make_accelerator
        cores=available_cores curves=run_context end_processes first_process=is_main_process free_memory
        generators=spawn_generators heard_by_all=raise_on_all_ranks hidden_bar=progress_bar in_order=gather_in_order
        in_precision=autocast made_once=compute_once my_turns=shard_batches noted_signals=catch_signals
        own_randomness=fork_rng quiet_accelerate=import_accelerate random_state=rng_state
        same_everywhere=check_same_step say=print_main signal_of_any=any_signal
        sum_over_processes=all_reduce_sum this_process trackers
    """,
    "pretrained": """
        OLD_NAMES OLD_WEIGHTS PREDICTION_TYPES SAMPLER_ONLY=IGNORED SCHEDULER_DEFAULTS SCHEDULER_ONLY=ONLY_VALUES
        VARIANCE_TYPES WEIGHTS download=download_model load_ddpm load_schedule=load_scheduler load_unet
        PASSING=check_same_model open_run=load_run read_weights same_model=check_same_model save_ddpm scheduler_config
        word_for=first_key write_checkpoint
    """,
    "images": """
        NAMED amount=format_bytes channels_first draw_way=record_trajectory finished=to_batch image_grid load_array
        save_picture=track_picture load_digits load_mnist5k outline=describe_images residence=choose_residence
        whole_numbers=load_array
    """,
    "decoding": """
        Broken=BrokenImages FORMATS SUFFIXES decoded=decode_image eight_bits=to_uint8 first_images header=read_header
        opened=open_image planes=to_planes reason=error_reason resized=crop_and_resize
    """,
    "sources": """
        Files=ImageFiles HUB Rows=ImageTable SPLITS attempts=map_images hub_shelf=open_hub image_folder
        local_shelf=open_local need_datasets=import_datasets need_one_size=check_one_size open_cell parquet_files
        paths_below=scan_folder quiet_datasets split_of table_of=load_table whole_labels=column_labels
    """,
    "loading": """
        StoredImages Turns=BatchReader data_digest fetched=load_images_once into_memory=decode_all
        load_shelf=load_source load_stream loaded=read_ahead survey
    """,
    "trainer": """
        OBJECTIVES advice=error_advice check_config ema_update go_on=resume_run logger open_checkpoints plot_losses
        run_facts=run_metadata save_run=save_checkpoint
    """,
    "sampler": """
        Plan Sampling ancestral_plan between=ddim_coefficients compiled_step ddim_plan draw_missing=draw_batches
        drawing_request=sampling_request follow=run_plan limiter one_step=sampler_step
        prediction_weights=prediction_coefficients replayed_step sample_steps start=initial_noise step_table
        strided=strided_schedule time_steps walk=sample_steps
    """,
    "neighbours": """
        neighbour_distance=kth_neighbour_distance share_within=fraction_within
    """,
    "metrics": """
        INCEPTION INCEPTION_SHA256 MOST=MAX_RECORDED Noting=RecordingFeatures Reference RunningStatistics
        Statistics=FeatureStatistics feature_statistics features_of=extract_features
        noise_statistics reference_of=make_reference root=matrix_sqrt
        statistics_of=image_statistics
    """,
    "evaluation": """
        BitsPerDim Evaluation=EvaluationRun RateDistortion asked_times=sample_terms bound_sums check_request
        evaluate_bpd features_for=make_features finish=remove_caches means_and_errors measure_bits measure_samples
        measured_bits=measure_bpd no_sums=zero_sums plot_bits read_reference=load_reference write_results
    """,
    "options": """
        Train Typed=UncheckedTrainConfig recipe_of=default_train typed=option_value
    """,
    "drawing": """
        FORMS=OUTPUT_FORMATS Sample destination=resolve_output
    """,
    "cli": """
        Demo Evaluate complain=print_error findings=demo_report main scorecard shown_log=show_log table=format_table
        versions
    """,
}


def _now() -> dict[str, str]:
    "Return the place of every earlier name, as `module.name`, or `name` where it is public."
    now = {}
    for module, names in _MOVED.items():
        for entry in names.split():
            old, _, new = entry.partition("=")
            now[old] = f"{module}.{new or old}".lstrip(".")
    return now


NOW = _now()


def explain(name: str) -> Exception:
    "Return the error for a name that `ddpm_lit` does not have; it says where an earlier name is now."
    if name in NOW:
        return ImportError(f"ddpm_lit.{name} is now ddpm_lit.{NOW[name]}")
    return AttributeError(f"module 'ddpm_lit' has no attribute {name!r}")
