{{/*
What the deployment file says, from values: filled with defaults, checked against the nodes, and as Serve takes it.
`spray build` prints the same of the same file; tests/helm/test_serve_config.py compares them.
*/}}

{{/*
A value with the defaults of those keys that it leaves out, as {"v": ...}. Takes "default" and "given". A list of one
section as a default says what each item of a given list has.
*/}}
{{- define "spray.filled" -}}
{{- $default := .default }}
{{- $given := .given }}
{{- if and (kindIs "map" $default) (kindIs "map" $given) }}
{{- $filled := dict }}
{{- range $key, $value := $default }}
{{- if hasKey $given $key }}
{{- $_ := set $filled $key (include "spray.filled" (dict "default" $value "given" (get $given $key)) | fromJson).v }}
{{- else }}
{{- $_ := set $filled $key (ternary (list) $value (kindIs "slice" $value)) }}
{{- end }}
{{- end }}
{{- range $key, $value := $given }}
{{- if not (hasKey $default $key) }}
{{- $_ := set $filled $key $value }}
{{- end }}
{{- end }}
{{- toJson (dict "v" $filled) }}
{{- else if and (kindIs "slice" $default) (kindIs "slice" $given) $default }}
{{- $filled := list }}
{{- range $given }}
{{- $filled = append $filled (include "spray.filled" (dict "default" (first $default) "given" .) | fromJson).v }}
{{- end }}
{{- toJson (dict "v" $filled) }}
{{- else }}
{{- toJson (dict "v" $given) }}
{{- end }}
{{- end }}

{{/* The models with all their keys, as {"models": [{"name", "fixed", "live", "degree", ...}]}. */}}
{{- define "spray.models" -}}
{{- $sample := first (include "spray.generated" . | fromJson).serve.applications }}
{{- $live := (first $sample.deployments).user_config.model }}
{{- $models := list }}
{{- $names := dict }}
{{- range .Values.models }}
{{- $model := . }}
{{- range concat (list .name) (default (list) .aliases) }}
{{- if hasKey $names . }}
{{- fail (printf "models: two models are called %q; give each its own names" .) }}
{{- end }}
{{- $_ := set $names . true }}
{{- end }}
{{- if not (or (hasPrefix "/" .source) (regexMatch "^[\\w-][\\w.-]*/[\\w.-]+$" .source)) }}
{{- fail (printf "models.%s.source is %q; in a cluster it is a hub id (org/name) or an absolute folder of the nodes" .name .source) }}
{{- end }}
{{- range default (list) .loras }}
{{- if not (hasPrefix "/" .source) }}
{{- fail (printf "models.%s.loras.%s.source is %q; in a cluster it is an absolute file of the nodes" $model.name .name .source) }}
{{- end }}
{{- end }}
{{- $defaults := dict }}
{{- range $key, $value := $sample.args }}{{ $_ := set $defaults $key $value }}{{ end }}
{{- range $key, $value := $live }}{{ $_ := set $defaults $key $value }}{{ end }}
{{- $filled := (include "spray.filled" (dict "default" $defaults "given" .) | fromJson).v }}
{{- if kindIs "map" $filled.elastic }}{{ $_ := set $filled "elastic" (merge $filled.elastic (dict "min_degree" 1)) }}{{ end }}
{{- $fixed := dict }}
{{- range $key, $_ := $sample.args }}{{ $_ := set $fixed $key (get $filled $key) }}{{ end }}
{{- $changing := dict }}
{{- range $key, $_ := $live }}{{ $_ := set $changing $key (get $filled $key) }}{{ end }}
{{- $degrees := $filled.parallel }}
{{- $ranks := mul $degrees.ulysses_degree $degrees.ring_degree $degrees.tensor_parallel_size $degrees.cfg_parallel_size }}
{{- $models = append $models (dict "all" $filled "fixed" $fixed "live" $changing "ranks" $ranks) }}
{{- end }}
{{- toJson (dict "models" $models) }}
{{- end }}

{{/* The sections of a deployment file besides models, with what the chart sets of them. A null takes a key out. */}}
{{- define "spray.sections" -}}
{{- $storage := deepCopy .Values.storage }}
{{- if not (get $storage "models") }}{{ $_ := set $storage "models" "/models/hub" }}{{ end }}
{{- if or .Values.outputs.existingClaim .Values.outputs.size }}
{{- $outputs := default dict (get $storage "outputs") }}
{{- $_ := set $outputs "folder" "/outputs" }}
{{- $_ := set $storage "outputs" $outputs }}
{{- end }}
{{- with .Values.outputs.s3.url }}{{ $_ := set $storage "outputs" (set (default dict (get $storage "outputs")) "url" .) }}{{ end }}
{{- if .Values.jobs.existingSecret }}{{ $_ := set $storage "jobs_url_env" "SPRAY_JOBS_URL" }}{{ end }}
{{- if include "spray.stateClaim" . }}
{{- if not (get $storage "jobs_url_env") }}{{ $_ := set $storage "jobs" "/var/lib/spray" }}{{ end }}
{{- $_ := set $storage "idempotency" (set (default dict (get $storage "idempotency")) "folder" "/var/lib/spray") }}
{{- end }}
{{- $auth := deepCopy .Values.auth }}
{{- if .Values.apiKeys.existingSecret }}{{ $_ := set $auth "api_keys_file" (printf "/etc/spray/keys/%s" .Values.apiKeys.key) }}{{ end }}
{{- $at := dict "host" (default .Values.gateway.host (get .Values.metrics "host")) "port" (get .Values.metrics "port" | default nil) }}
{{- if not (hasKey .Values.metrics "port") }}{{ $_ := set $at "port" nil }}{{ end }}
{{- $gateway := deepCopy .Values.gateway }}
{{- if and .Values.ingress.enabled .Values.ingress.tlsSecret (not (get $gateway "public_url")) }}
{{- $_ := set $gateway "public_url" (printf "https://%s" .Values.ingress.host) }}
{{- end }}
{{- toJson (dict "gateway" $gateway "limits" .Values.limits "metrics" $at "storage" $storage "auth" $auth) }}
{{- end }}

{{/* What RayService calls serveConfigV2. */}}
{{- define "spray.serveConfig" -}}
{{- $serve := (include "spray.generated" . | fromJson).serve }}
{{- $ofModel := first $serve.applications }}
{{- $ofGateway := last $serve.applications }}
{{- $sections := include "spray.sections" . | fromJson }}
{{- $gateway := $sections.gateway }}
{{- $storage := $sections.storage }}
{{- $models := (include "spray.models" . | fromJson).models }}
{{- $sample := first $ofModel.deployments }}
{{- $samplesQueue := add $sample.user_config.model.max_queued $sample.autoscaling_config.max_replicas }}
{{- $gatewayOptions := deepCopy (first $ofGateway.deployments) }}
{{- $longest := 0 }}
{{- $most := sub $gatewayOptions.max_ongoing_requests $samplesQueue }}
{{- $tracing := (include "spray.filled" (dict "default" $gatewayOptions.user_config.tracing "given" .Values.tracing) | fromJson).v }}
{{- $applications := list }}
{{- $table := list }}
{{- range $models }}
{{- $model := .all }}
{{- $options := deepCopy $sample }}
{{- $_ := set $options.user_config "model" .live }}
{{- $_ := set $options.user_config "metrics" $sections.metrics }}
{{- $_ := set $options.user_config "tracing" $tracing }}
{{- range $key, $_ := $options.user_config.storage }}
{{- $_ := set $options.user_config.storage $key (get $storage $key | default nil) }}
{{- end }}
{{- range $key, $_ := $options.autoscaling_config }}
{{- if hasKey $model.autoscaling $key }}{{ $_ := set $options.autoscaling_config $key (get $model.autoscaling $key) }}{{ end }}
{{- end }}
{{- $bundle := dict "CPU" $model.placement.cpus_per_rank }}
{{- if eq $model.device "cuda" }}{{ $_ := set $bundle "GPU" 1 }}{{ end }}
{{- with $model.placement.memory }}{{ $_ := set $bundle "memory" . }}{{ end }}
{{- with $model.placement.accelerator_type }}{{ $_ := set $bundle (printf "accelerator_type:%s" .) 0.001 }}{{ end }}
{{- $bundles := list }}
{{- range until (int .ranks) }}{{ $bundles = append $bundles $bundle }}{{ end }}
{{- $_ := set $options "placement_group_bundles" $bundles }}
{{- $_ := set $options "placement_group_strategy" $model.placement.strategy }}
{{- with $model.placement.node_labels }}{{ $_ := set $options "placement_group_bundle_label_selector" (list .) }}{{ end }}
{{- $_ := set $options "graceful_shutdown_timeout_s" $model.grace_period_s }}
{{- /* Not `not`: values of an older chart, as --reuse-values takes them, have no such key. */}}
{{- if eq (get $.Values.upgrade "newGangsFirst" | toString) "false" }}{{ $_ := set $options "max_surge_percent" 0 }}{{ end }}
{{- /* As slots() of workers/gang/elastic.py. */}}
{{- if $model.elastic }}{{ $_ := set $options "max_ongoing_requests" (mul 2 (div .ranks $model.parallel.tensor_parallel_size)) }}{{ end }}
{{- $name := printf "%s%s" (trimSuffix "a" $ofModel.name) $model.name }}
{{- $application := deepCopy $ofModel }}
{{- $_ := set $application "name" $name }}
{{- $_ := set $application "args" .fixed }}
{{- $_ := set $application "deployments" (list $options) }}
{{- $applications = append $applications $application }}
{{- $table = append $table (omit $model "env") }}
{{- $most = add $most $model.max_queued $model.autoscaling.max_replicas }}
{{- if gt (float64 $model.grace_period_s) (float64 $longest) }}{{ $longest = $model.grace_period_s }}{{ end }}
{{- end }}
{{- $_ := set $gatewayOptions "num_replicas" (default 1 $gateway.replicas) }}
{{- /* Serve spreads gateways over the nodes that are there now. All on one node, they would end with it, and the others would
       never be ready, so that none may be drained. */}}
{{- $nodes := int $.Values.gatewayNodes.minReplicas }}
{{- if ge $nodes 2 }}{{ $_ := set $gatewayOptions "max_replicas_per_node" (int (ceil (divf (float64 (default 1 $gateway.replicas)) (float64 $nodes)))) }}{{ end }}
{{- $_ := set $gatewayOptions "max_ongoing_requests" $most }}
{{- $_ := set $gatewayOptions "graceful_shutdown_timeout_s" $longest }}
{{- with $gateway.node_labels }}{{ $_ := set $gatewayOptions.ray_actor_options "label_selector" . }}{{ end }}
{{- $told := $gatewayOptions.user_config }}
{{- range $section, $given := $sections }}
{{- range $key, $value := $given }}
{{- if hasKey $told $key }}{{ $_ := set $told $key (include "spray.filled" (dict "default" (get $told $key) "given" $value) | fromJson).v }}{{ end }}
{{- end }}
{{- end }}
{{- $_ := set $told "jobs" (dict "folder" (get $storage "jobs" | default nil) "url_env" (get $storage "jobs_url_env" | default nil)) }}
{{- $_ := set $told "log" (dict "log_format" (get $gateway "log_format" | default $told.log.log_format) "prompts" (get $gateway "log_prompts" | default false)) }}
{{- $_ := set $told "models" $table }}
{{- $_ := set $told "gateways" (default 1 $gateway.replicas) }}
{{- $_ := set $told "local_only" false }}
{{- $_ := set $told "models_folder" $storage.models }}
{{- $_ := set $told "metrics" $sections.metrics }}
{{- $_ := set $told "tracing" $tracing }}
{{- $grpc := $serve.grpc_options }}
{{- if get $gateway "grpc_port" }}{{ $_ := set $grpc "port" $gateway.grpc_port }}{{ else }}{{ $grpc = dict "grpc_servicer_functions" list }}{{ end }}
{{- $config := dict "proxy_location" $serve.proxy_location "http_options" (dict "host" $gateway.host "port" $gateway.port) "grpc_options" $grpc }}
{{- $_ := set $ofGateway "deployments" (list $gatewayOptions) }}
{{- $_ := set $config "applications" (append $applications $ofGateway) }}
{{- toYaml $config }}
{{- end }}
