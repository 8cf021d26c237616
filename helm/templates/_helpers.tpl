{{/* Names, labels, the image: what objects share. */}}

{{- define "spray.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 47 | trimSuffix "-" }}
{{- else }}
{{- $name := default .Chart.Name .Values.nameOverride }}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 47 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{/* Of all objects. Not of pods: a new version would change them, and KubeRay would start a new cluster. */}}
{{- define "spray.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/name: {{ .Chart.Name }}
{{ include "spray.podLabels" . }}
{{- with .Values.commonLabels }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Of all pods, and what selects them. KubeRay sets app.kubernetes.io/name of its own. */}}
{{- define "spray.podLabels" -}}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/part-of: spray
{{- end }}

{{- define "spray.rayPods" -}}
{{ include "spray.podLabels" . }}
ray.io/is-ray-node: "yes"
{{- end }}

{{- define "spray.image" -}}
{{- $image := .Values.image }}
{{- if not $image.repository }}
{{- fail "image.repository is empty; build the image (`make image`), push it to a registry that the nodes reach, and name it" }}
{{- end }}
{{- if eq $image.tag "latest" }}
{{- fail "image.tag is latest, which may be another image on each node; name a version, or image.digest" }}
{{- end }}
{{- with $image.digest }}{{ $image.repository }}@{{ . }}{{ else }}{{ $image.repository }}:{{ default .Chart.AppVersion $image.tag }}{{ end }}
{{- end }}

{{- define "spray.pullSecrets" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
{{- range . }}
  - name: {{ . }}
{{- end }}
{{- end }}
{{- end }}

{{- define "spray.headAccount" -}}
{{- default (printf "%s-head" (include "spray.fullname" .)) .Values.serviceAccount.headName }}
{{- end }}

{{- define "spray.workerAccount" -}}
{{- default (printf "%s-worker" (include "spray.fullname" .)) .Values.serviceAccount.workerName }}
{{- end }}

{{- define "spray.serveService" -}}
{{ include "spray.fullname" . }}-serve-svc
{{- end }}

{{/* Seconds after which no request goes on that has come in: it may wake its model, wait for its turn, and then be drawn. A model
without max_queued_s has no such bound; then only its grace_period_s counts. */}}
{{- define "spray.longestRequest" -}}
{{- $longest := int .Values.upgrade.drainSeconds }}
{{- range (include "spray.models" . | fromJson).models }}
{{- $wakes := ternary (dig "timeouts" "startup_s" 0 .all) 0 (eq 0 (int (dig "autoscaling" "min_replicas" 1 .all))) }}
{{- $seconds := addf (float64 .all.grace_period_s) (float64 (default 0 .all.max_queued_s)) (float64 $wakes) }}
{{- $longest = max $longest (int (ceil $seconds)) }}
{{- end }}
{{- $longest }}
{{- end }}

{{/*
What `helm test` and the notes ask for, as {"model", "video"}: tests.model, or the first model that draws pictures from text, or
the first. What a model makes is known by its tasks, or by the frames of its defaults.
*/}}
{{- define "spray.asked" -}}
{{- $wanted := .Values.tests.model }}
{{- $asked := dict }}
{{- range .Values.models }}
{{- $video := gt (int (get (default dict (get . "defaults")) "num_frames")) 1 }}
{{- with get . "tasks" }}{{ $video = not (has "text-to-image" .) }}{{ end }}
{{- $named := has $wanted (concat (list .name) (default list (get . "aliases"))) }}
{{- if and (not $asked) (ternary $named (not $video) (ne $wanted "")) }}
{{- $asked = dict "model" (default .name $wanted) "video" $video }}
{{- end }}
{{- end }}
{{- toJson (default (dict "model" (default (first .Values.models).name $wanted) "video" (eq $wanted "")) $asked) }}
{{- end }}

{{/* The head's claim; empty if it has none. */}}
{{- define "spray.stateClaim" -}}
{{- $state := .Values.state }}
{{- if or $state.existingClaim $state.size }}
{{- default (printf "%s-state" (include "spray.fullname" .)) $state.existingClaim }}
{{- end }}
{{- end }}

{{/* Of the bundled Redis's pod, and what selects it. */}}
{{- define "spray.redisLabels" -}}
{{ include "spray.podLabels" . }}
app.kubernetes.io/component: redis
{{- end }}

{{/* host:port of the Redis that outlives the head; empty if there is none. */}}
{{- define "spray.redisAddress" -}}
{{- if .Values.redis.bundled.enabled }}{{ include "spray.fullname" . }}-redis:6379{{ else }}{{ .Values.redis.address }}{{ end }}
{{- end }}

{{/* What is generated from the rest of the project. */}}
{{- define "spray.generated" -}}
{{ .Files.Get "files/serve.json" }}
{{- end }}
