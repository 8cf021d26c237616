{{/* What cannot work is refused here, with the reason, before anything reaches the cluster. */}}

{{- define "spray.check" -}}
{{- $sections := include "spray.sections" . | fromJson }}
{{- $models := (include "spray.models" . | fromJson).models }}
{{- $groups := (include "spray.groups" . | fromJson).groups }}
{{- if not $models }}
{{- fail "models is empty; name at least one, as in a deployment file: models: [{name: ..., source: ...}]" }}
{{- end }}
{{- $host := $sections.gateway.host }}
{{- if or (hasPrefix "127." $host) (eq $host "localhost") (eq $host "::1") }}
{{- fail (printf "gateway.host is %s, where no other pod reaches it; leave it out, or 0.0.0.0" $host) }}
{{- end }}
{{- range $key, $section := dict "gateway.port" .Values.gateway "gateway.grpc_port" .Values.gateway "metrics.port" .Values.metrics }}
{{- $name := last (splitList "." $key) }}
{{- if hasKey $section $name }}
{{- if eq (int (get $section $name)) 0 }}
{{- fail (printf "%s is 0, which takes a free port; in a cluster, name a port" $key) }}
{{- end }}
{{- end }}
{{- end }}
{{- include "spray.checkPorts" .Values }}
{{- include "spray.checkAccess" (dict "Values" .Values "sections" $sections) }}
{{- include "spray.checkSecrets" . }}
{{- $names := dict }}
{{- range $groups }}
{{- if hasKey $names .name }}{{ fail (printf "groups: two are called %q; give each its own name" .name) }}{{ end }}
{{- $_ := set $names .name true }}
{{- if gt (int .minReplicas) (int .maxReplicas) }}
{{- fail (printf "groups.%s.minReplicas is %d, above maxReplicas, %d; change one" .name (int .minReplicas) (int .maxReplicas)) }}
{{- end }}
{{- end }}
{{- include "spray.checkHosts" $groups }}
{{- range concat (list .Values.head .Values.gatewayNodes .Values.nodeDefaults) .Values.groups }}
{{- include "spray.checkVolumes" . }}
{{- end }}
{{- $holds := or .Values.apiKeys.existingSecret .Values.jobs.existingSecret .Values.outputs.existingClaim .Values.outputs.size .Values.outputs.s3.existingSecret }}
{{- include "spray.checkGateways" (dict "gateway" $sections.gateway "groups" $groups "holds" $holds) }}
{{- include "spray.checkFolders" (dict "root" . "sections" $sections "groups" $groups "models" $models) }}
{{- range $models }}
{{- if gt (float64 .all.grace_period_s) (float64 (sub $.Values.upgrade.drainSeconds 30)) }}
{{- fail (printf "models.%s.grace_period_s is %v, but upgrade.drainSeconds is %d; a pod needs 30 s more than its longest request, so raise the latter" .all.name .all.grace_period_s (int $.Values.upgrade.drainSeconds)) }}
{{- end }}
{{- include "spray.checkPlace" (dict "model" .all "ranks" .ranks "groups" $groups) }}
{{- end }}
{{- end }}

{{/* Two servers of a pod at one port: the API server refuses the pod, or the second one does not start. Takes the values. */}}
{{- define "spray.checkPorts" -}}
{{- $taken := dict "6379" "Ray's head" "8080" "Ray's metrics" "8265" "Ray's dashboard" "10001" "Ray's clients" "44217" "Ray's autoscaler" "44227" "Ray's dashboard" "52365" "Ray's agent" }}
{{- range list (list "gateway.port" (get .gateway "port")) (list "gateway.grpc_port" (get .gateway "grpc_port")) (list "metrics.port" (get .metrics "port")) }}
{{- $port := last . | default 0 | int }}
{{- if $port }}
{{- $holder := get $taken (toString $port) }}
{{- if and (ge $port 10002) (le $port 19999) }}{{ $holder = "Ray's workers, which take those from 10002 to 19999" }}{{ end }}
{{- if $holder }}
{{- fail (printf "%s is %d, which is the port of %s; take another" (first .) $port $holder) }}
{{- end }}
{{- $_ := set $taken (toString $port) (first .) }}
{{- end }}
{{- end }}
{{- end }}

{{/* A pod has each volume and each mount once. Takes a node. */}}
{{- define "spray.checkVolumes" -}}
{{- range default list (get . "extraVolumes") }}
{{- if has .name (list "shm" "tmp" "home" "models" "demo" "state" "api-keys" "outputs") }}
{{- fail (printf "extraVolumes has %s, which is the name of a volume of the chart; take another" .name) }}
{{- end }}
{{- end }}
{{- range default list (get . "extraVolumeMounts") }}
{{- if has (trimSuffix "/" .mountPath) (list "/dev/shm" "/tmp" "/home/spray" "/models" "/demo" "/var/lib/spray" "/etc/spray/keys" "/outputs") }}
{{- fail (printf "extraVolumeMounts has %s, where the chart mounts a volume of its own; take a folder in it, or another" .mountPath) }}
{{- end }}
{{- end }}
{{- end }}

{{- define "spray.checkAccess" -}}
{{- $auth := .sections.auth }}
{{- $variable := get $auth "api_keys_env" }}
{{- if not (or $variable (get $auth "api_keys_file") (get $auth "insecure")) }}
{{- fail "nobody needs a key: name a Secret with the file of `spray key` in apiKeys.existingSecret, or allow it with auth.insecure: true" }}
{{- end }}
{{- if and (get $auth "api_keys_file") (not .Values.apiKeys.existingSecret) }}
{{- fail "auth.api_keys_file is set by the chart; name the Secret that holds the file in apiKeys.existingSecret" }}
{{- end }}
{{- $known := dict "SPRAY_JOBS_URL" (ne .Values.jobs.existingSecret "") }}
{{- $plain := dict }}
{{- range concat .Values.nodeDefaults.env (default list .Values.gatewayNodes.env) }}
{{- $_ := set $known .name true }}
{{- if get . "value" }}{{ $_ := set $plain .name true }}{{ end }}
{{- end }}
{{- $named := dict "auth.api_keys_env" $variable "gateway.webhook_key_env" (get .sections.gateway "webhook_key_env") "storage.jobs_url_env" (get .sections.storage "jobs_url_env") }}
{{- range $key, $variable := $named }}
{{- if and $variable (not (get $known $variable)) }}
{{- fail (printf "%s is %s, which no gateway has; add it to gatewayNodes.env with valueFrom.secretKeyRef" $key $variable) }}
{{- end }}
{{- if and $variable (get $plain $variable) }}
{{- include "spray.failPlain" $variable }}
{{- end }}
{{- end }}
{{- end }}

{{- define "spray.checkSecrets" -}}
{{- $redis := .Values.redis }}
{{- if and (or $redis.address $redis.bundled.enabled) (not $redis.existingSecret) }}
{{- fail (printf "redis.%s is set, but redis.existingSecret is not; name the Secret with Redis's password" (ternary "bundled.enabled" "address" $redis.bundled.enabled)) }}
{{- end }}
{{- if and $redis.address $redis.bundled.enabled }}
{{- fail (printf "redis.address is %s, and redis.bundled.enabled is true; leave one of them out" $redis.address) }}
{{- end }}
{{- if and $redis.bundled.enabled (not (regexMatch ".+(:[\\w][\\w.-]*|@sha256:[0-9a-f]{64})$" (base $redis.bundled.image))) }}
{{- fail (printf "redis.bundled.image is %s; name a tag or a digest" $redis.bundled.image) }}
{{- end }}
{{- if hasSuffix ":latest" $redis.bundled.image }}
{{- fail "redis.bundled.image is latest, which may be another image tomorrow; name a version, or a digest" }}
{{- end }}
{{- if and .Values.jobs.existingSecret (get .Values.storage "jobs") }}
{{- fail "storage.jobs is set, and jobs.existingSecret names a database; leave one of them out" }}
{{- end }}
{{- $outputs := .Values.outputs }}
{{- if and $outputs.s3.url (or $outputs.existingClaim $outputs.size) }}
{{- fail (printf "outputs.s3.url is %s, and outputs has a claim; leave one of them out" $outputs.s3.url) }}
{{- end }}
{{- if and $outputs.s3.url (not (regexMatch "^s3://[a-z0-9][a-z0-9.-]+(/[A-Za-z0-9._-]+)*$" $outputs.s3.url)) }}
{{- fail (printf "outputs.s3.url is %s; it is s3://BUCKET or s3://BUCKET/PREFIX" $outputs.s3.url) }}
{{- end }}
{{- if and $outputs.s3.url (not (or $outputs.s3.existingSecret .Values.serviceAccount.annotations (not .Values.serviceAccount.create))) }}
{{- fail "outputs.s3.url is set, and nothing may write there; name the Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in outputs.s3.existingSecret" }}
{{- end }}
{{- if and $outputs.s3.existingSecret (not $outputs.s3.url) }}
{{- fail "outputs.s3.existingSecret is set, and outputs.s3.url is empty; name the bucket" }}
{{- end }}
{{- $cache := .Values.cache }}
{{- if and $cache.prefetch (not (or $cache.existingClaim $cache.size)) }}
{{- fail "cache.prefetch is true, but there is no claim to fill; set cache.size or cache.existingClaim" }}
{{- end }}
{{- if and .Values.ingress.enabled (not .Values.ingress.host) }}
{{- fail "ingress.enabled is true, but ingress.host is empty; name the host" }}
{{- end }}
{{- if and .Values.gatewayApi.enabled (not .Values.gatewayApi.parentRefs) }}
{{- fail "gatewayApi.enabled is true, but gatewayApi.parentRefs is empty; name the Gateway to attach to" }}
{{- end }}
{{- if and (not .Values.serviceAccount.create) (not (and .Values.serviceAccount.headName .Values.serviceAccount.workerName)) }}
{{- fail "serviceAccount.create is false; name the accounts in serviceAccount.headName and serviceAccount.workerName" }}
{{- end }}
{{- if and .Values.ingress.enabled .Values.ingress.grpcHost }}
{{- if not (get .Values.gateway "grpc_port") }}
{{- fail (printf "ingress.grpcHost is %s, and gateway.grpc_port is null; leave one of them out" .Values.ingress.grpcHost) }}
{{- end }}
{{- if and .Values.ingress.nginx (not .Values.ingress.tlsSecret) }}
{{- fail (printf "ingress.grpcHost is %s, but nginx speaks gRPC's HTTP/2 over TLS only; name the certificate in ingress.tlsSecret" .Values.ingress.grpcHost) }}
{{- end }}
{{- end }}
{{- if and .Values.gatewayApi.enabled .Values.gatewayApi.grpcHostnames (not (get .Values.gateway "grpc_port")) }}
{{- fail "gatewayApi.grpcHostnames is set, and gateway.grpc_port is null; leave one of them out" }}
{{- end }}
{{- $secret := "(?i)(token|secret|password|api_?key|_headers$)" }}
{{- range concat (list .Values.head .Values.gatewayNodes .Values.nodeDefaults) .Values.groups }}
{{- range default list (get . "env") }}
{{- if and (regexMatch $secret .name) (get . "value") }}{{ include "spray.failPlain" .name }}{{ end }}
{{- end }}
{{- end }}
{{- range .Values.models }}
{{- range $name, $value := default dict (get . "env") }}
{{- if and (regexMatch $secret $name) $value }}
{{- fail (printf "models.env has %s, where everybody reads it who may see the RayService; give it to nodeDefaults.env with valueFrom.secretKeyRef" $name) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/* Takes the name of a variable. */}}
{{- define "spray.failPlain" -}}
{{- fail (printf "env %s has its value in plain, where everybody reads it who may see pods; use valueFrom.secretKeyRef" .) }}
{{- end }}

{{- define "spray.checkGateways" -}}
{{- $wanted := get .gateway "node_labels" | default dict }}
{{- $homes := (include "spray.labeled" (dict "labels" $wanted "groups" .groups) | fromJson).names }}
{{- if not $homes }}
{{- fail (printf "gateway.node_labels is %s, which no group has; give it to gatewayNodes.labels" (toJson $wanted)) }}
{{- end }}
{{- $own := (first .groups).name }}
{{- $others := without $homes $own }}
{{- if and .holds $others }}
{{- fail (printf "gateway.node_labels is %s, so a gateway may run on nodes of %s, which have no keys, jobs and outputs of gateways; use a label that only gatewayNodes has" (toJson $wanted) (join ", " $others)) }}
{{- end }}
{{- end }}

{{/* The names of the groups whose nodes have these labels, as {"names": [...]}. Takes "labels", "groups". */}}
{{- define "spray.labeled" -}}
{{- $wanted := .labels | default dict }}
{{- $names := list }}
{{- range .groups }}
{{- $group := . }}
{{- $fits := true }}
{{- range $key, $value := $wanted }}{{ if ne (get $group.labels $key | default "" | toString) (toString $value) }}{{ $fits = false }}{{ end }}{{ end }}
{{- if $fits }}{{ $names = append $names .name }}{{ end }}
{{- end }}
{{- toJson (dict "names" $names) }}
{{- end }}

{{/*
Folders that pods cannot write, their root being read-only: of jobs and keys on the head, of outputs where gateways may run,
of weights and compiled blocks where gangs may. Takes "root", "sections", "groups", "models".
*/}}
{{- define "spray.checkFolders" -}}
{{- if .root.Values.securityContext.readOnlyRootFilesystem }}
{{- $root := .root }}
{{- $storage := .sections.storage }}
{{- $head := include "spray.node" (dict "defaults" $root.Values.nodeDefaults "node" $root.Values.head) | fromJson }}
{{- $onHead := dict "root" $root "node" $head "role" "head" "where" "the head" "mount" "head.extraVolumeMounts" }}
{{- $state := "leave it out and set state.size" }}
{{- include "spray.checkFolder" (merge (dict "key" "storage.jobs" "folder" (get $storage "jobs") "instead" $state) $onHead) }}
{{- $keys := dig "folder" "" (default dict (get $storage "idempotency")) }}
{{- include "spray.checkFolder" (merge (dict "key" "storage.idempotency.folder" "folder" $keys "instead" $state) $onHead) }}
{{- $models := .models }}
{{- if and $root.Values.cache.prefetch (not (hasPrefix "/models/" (printf "%s/" $storage.models))) }}
{{- fail (printf "storage.models is %s, and cache.prefetch fills the claim at /models; leave storage.models out, or name a folder there" $storage.models) }}
{{- end }}
{{- $gateways := (include "spray.labeled" (dict "labels" .sections.gateway.node_labels "groups" .groups) | fromJson).names }}
{{- $outputs := dig "folder" "" (default dict (get $storage "outputs")) }}
{{- range $index, $group := .groups }}
{{- $role := ternary "gateway" "worker" (eq $index 0) }}
{{- $mount := printf "extraVolumeMounts of groups.%s" .name }}
{{- if eq $index 0 }}{{ $mount = "gatewayNodes.extraVolumeMounts" }}{{ end }}
{{- $here := dict "root" $root "node" . "role" $role "where" (printf "the nodes of %s" .name) "mount" $mount }}
{{- if has .name $gateways }}
{{- include "spray.checkFolder" (merge (dict "key" "storage.outputs.folder" "folder" $outputs "instead" "leave it out and set outputs.size") $here) }}
{{- end }}
{{- range $models }}
{{- $place := .all.placement }}
{{- $labeled := (include "spray.labeled" (dict "labels" $place.node_labels "groups" (list $group)) | fromJson).names }}
{{- $accelerated := or (not $place.accelerator_type) (eq (toString $place.accelerator_type) $group.accelerator) }}
{{- if and $labeled $accelerated (or (eq .all.device "cpu") (gt (int $group.gpus) 0)) }}
{{- if not (hasPrefix "/" .all.source) }}
{{- include "spray.checkFolder" (merge (dict "key" "storage.models" "folder" $storage.models "instead" "leave it out and set cache.size" "fetched" true) $here) }}
{{- end }}
{{- if .all.compile }}
{{- include "spray.checkFolder" (merge (dict "key" "storage.compiled" "folder" (get $storage "compiled") "instead" "name a folder in /models") $here) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}

{{/*
Whether a pod may write to a folder: the nearest mount above it is not read-only. What is "fetched" may have been fetched
before. Takes "root", "node" and "role" of the pod, "key" and "folder", and to say what to do, "where", "instead" and "mount".
*/}}
{{- define "spray.checkFolder" -}}
{{- with .folder }}
{{- $folder := . }}
{{- $fetched := get $ "fetched" }}
{{- $above := "" }}
{{- $writable := false }}
{{- $pod := include "spray.podTemplate" (dict "root" $.root "node" $.node "role" $.role) | fromYaml }}
{{- range (first $pod.spec.containers).volumeMounts }}
{{- $at := trimSuffix "/" .mountPath }}
{{- if and (hasPrefix (printf "%s/" $at) (printf "%s/" $folder)) (gt (len $at) (len $above)) }}
{{- $above = $at }}
{{- $writable = or $fetched (not (get . "readOnly")) }}
{{- end }}
{{- end }}
{{- if not $writable }}
{{- fail (printf "%s is %s, which %s cannot write: the root is read-only; %s, or mount a volume there by %s" $.key $folder $.where $.instead $.mount) }}
{{- end }}
{{- end }}
{{- end }}

{{/*
Nodes that come and go together: KubeRay deletes all as soon as one goes, and the autoscaler lets each go that is idle. Of
several such sets a gang may have a node each, and would end when the idle rest of either goes. Takes the groups.
*/}}
{{- define "spray.checkHosts" -}}
{{- $gateways := first . }}
{{- if gt (int $gateways.hosts) 1 }}
{{- fail (printf "gatewayNodes.hosts is %d, but no gateway needs another node; leave it at 1" (int $gateways.hosts)) }}
{{- end }}
{{- range . }}
{{- if and (gt (int .hosts) 1) (gt (int .maxReplicas) 1) (lt (int .minReplicas) (int .maxReplicas)) }}
{{- fail (printf "groups.%s: its nodes come and go by %d, and a gang on nodes of two such sets would end when the idle rest of either goes; set maxReplicas to 1, or minReplicas to maxReplicas, %d, or hosts to 1: then nodes come as a gang needs them, and go one by one" .name (int .hosts) (int .maxReplicas)) }}
{{- end }}
{{- end }}
{{- end }}

{{/* A quantity of Kubernetes, such as 64Gi, in bytes. */}}
{{- define "spray.bytes" -}}
{{- $text := toString . }}
{{- $number := regexFind "^[0-9.]+" $text }}
{{- $unit := trimPrefix $number $text }}
{{- $units := dict "" 1 "k" 1e3 "M" 1e6 "G" 1e9 "T" 1e12 "Ki" 1024 "Mi" 1048576 "Gi" 1073741824 "Ti" 1099511627776 }}
{{- if not (and $number (hasKey $units $unit)) }}
{{- fail (printf "memory %s cannot be read; write it as 64Gi" $text) }}
{{- end }}
{{- printf "%.0f" (mulf (float64 $number) (float64 (get $units $unit))) }}
{{- end }}

{{/* Whether a gang fits on a node, or for PACK on all nodes that there may be. Takes "model", "ranks", "groups". */}}
{{- define "spray.checkPlace" -}}
{{- $model := .model }}
{{- $placement := $model.placement }}
{{- $together := eq $placement.strategy "STRICT_PACK" }}
{{- $largest := 0 }}
{{- $all := 0 }}
{{- $homes := list }}
{{- range .groups }}
{{- $group := . }}
{{- $fits := true }}
{{- range $key, $value := $placement.node_labels }}{{ if ne (get $group.labels $key | default "" | toString) (toString $value) }}{{ $fits = false }}{{ end }}{{ end }}
{{- with $placement.accelerator_type }}{{ if ne . $group.accelerator }}{{ $fits = false }}{{ end }}{{ end }}
{{- if $fits }}
{{- $places := int (floor (divf (float64 .cpus) (float64 $placement.cpus_per_rank))) }}
{{- if eq $model.device "cuda" }}{{ $places = min $places (int .gpus) }}{{ end }}
{{- with $placement.memory }}{{ $places = min $places (int (floor (divf (include "spray.bytes" $group.memory | float64) (float64 .)))) }}{{ end }}
{{- $largest = max $largest $places }}
{{- $all = add $all (mul $places (int .hosts) (int .maxReplicas)) }}
{{- if $places }}{{ $homes = append $homes (dict "name" .name "hosts" .hosts "holds" (mul $places .hosts)) }}{{ end }}
{{- end }}
{{- end }}
{{- $memory := "" }}
{{- with $placement.memory }}{{ $memory = printf " and %.0f bytes of memory" (float64 .) }}{{ end }}
{{- $needs := printf "a gang has %d ranks of %s%v CPU cores%s each" (int .ranks) (ternary "one GPU and " "" (eq $model.device "cuda")) $placement.cpus_per_rank $memory }}
{{- with $placement.accelerator_type }}{{ $needs = printf "%s on %s" $needs . }}{{ end }}
{{- with $placement.node_labels }}{{ $needs = printf "%s with the labels %s" $needs (toJson .) }}{{ end }}
{{- if and $together (lt (int $largest) (int .ranks)) }}
{{- fail (printf "models.%s: %s, all on one node, and the largest group's nodes hold %d; add a group with larger nodes, use lower degrees, or placement.strategy: PACK to span nodes" $model.name $needs (int $largest)) }}
{{- end }}
{{- if and (not $together) (lt (int $all) (int .ranks)) }}
{{- fail (printf "models.%s: %s, and all nodes that the groups may have hold %d; raise maxReplicas of a group, or use lower degrees" $model.name $needs (int $all)) }}
{{- end }}
{{- $ranks := int .ranks }}
{{- range $homes }}
{{- if gt (int .hosts) 1 }}
{{- if mod $ranks .holds }}
{{- fail (printf "models.%s: a gang has %d ranks, and the %d nodes of group %s, which come and go together, hold %d; a gang that leaves one idle would end with it, so give it %d ranks, or keep it from there by placement.node_labels" $model.name $ranks (int .hosts) .name (int .holds) (int .holds)) }}
{{- end }}
{{- if gt (len $homes) 1 }}
{{- fail (printf "models.%s: its ranks may be on nodes of several groups, and those of %s come and go by %d; a gang with one of them would end with the idle rest, so choose one group by placement.node_labels" $model.name .name (int .hosts)) }}
{{- end }}
{{- end }}
{{- end }}
{{- end }}
