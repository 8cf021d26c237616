{{/* The Ray nodes: head, gateway nodes and groups, each filled with nodeDefaults, as parts of a RayCluster. */}}

{{/* The groups of workers, as {"groups": [...]}; the gateways' first. */}}
{{- define "spray.groups" -}}
{{- $groups := list }}
{{- $defaults := .Values.nodeDefaults }}
{{- range concat (list .Values.gatewayNodes) .Values.groups }}
{{- $groups = append $groups (include "spray.node" (dict "defaults" $defaults "node" .) | fromJson) }}
{{- end }}
{{- toJson (dict "groups" $groups) }}
{{- end }}

{{/* One node with all its keys. What a group says of a key replaces the default whole, but environments add up by name. */}}
{{- define "spray.node" -}}
{{- $node := dict }}
{{- range $key, $value := .defaults }}{{ $_ := set $node $key $value }}{{ end }}
{{- range $key, $value := .node }}{{ $_ := set $node $key $value }}{{ end }}
{{- $names := list }}
{{- $variables := dict }}
{{- range concat .defaults.env (default list (get .node "env")) }}
{{- if not (hasKey $variables .name) }}{{ $names = append $names .name }}{{ end }}
{{- $_ := set $variables .name . }}
{{- end }}
{{- $env := list }}
{{- range $names }}{{ $env = append $env (get $variables .) }}{{ end }}
{{- $_ := set $node "env" $env }}
{{- if not $node.sharedMemoryMiB }}
{{- $_ := set $node "sharedMemoryMiB" (add $node.objectStoreMiB 512 (mul 1024 $node.gpus)) }}
{{- end }}
{{- toJson $node }}
{{- end }}

{{/* Where a pod may run. Takes a node. */}}
{{- define "spray.scheduling" -}}
{{- with .priorityClassName }}
priorityClassName: {{ . }}
{{- end }}
{{- with .nodeSelector }}
nodeSelector: {{ toYaml . | nindent 2 }}
{{- end }}
{{- if or .tolerations .gpus }}
tolerations:
  {{- if .gpus }}
  - {key: {{ .gpuResource }}, operator: Exists, effect: NoSchedule}
  {{- end }}
  {{- with .tolerations }}{{ toYaml . | nindent 2 }}{{ end }}
{{- end }}
{{- with .affinity }}
affinity: {{ toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* The same for a pod without GPUs that is no node of Ray: it runs where gateways do. Takes the root. */}}
{{- define "spray.besideGateways" -}}
{{- include "spray.scheduling" (include "spray.node" (dict "defaults" .Values.nodeDefaults "node" .Values.gatewayNodes) | fromJson) }}
{{- end }}

{{/* A pod's template. Takes "root", "node", "role" (head, gateway or worker). */}}
{{- define "spray.podTemplate" -}}
{{- $root := .root }}
{{- $values := .root.Values }}
{{- $node := .node }}
{{- $role := .role }}
{{- $generated := include "spray.generated" $root | fromJson }}
metadata:
  labels:
    {{- include "spray.podLabels" $root | nindent 4 }}
    app.kubernetes.io/component: {{ $role }}
    {{- with $node.podLabels }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- $keep := and $node.keepGpuPods (gt (int $node.gpus) 0) }}
  {{- if or $keep $node.podAnnotations }}
  annotations:
    {{- if $keep }}
    cluster-autoscaler.kubernetes.io/safe-to-evict: "false"
    karpenter.sh/do-not-disrupt: "true"
    {{- end }}
    {{- with $node.podAnnotations }}{{ toYaml . | nindent 4 }}{{ end }}
  {{- end }}
spec:
  serviceAccountName: {{ include (ternary "spray.headAccount" "spray.workerAccount" (eq $role "head")) $root }}
  automountServiceAccountToken: {{ eq $role "head" }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ ternary 60 (int $values.upgrade.drainSeconds) (eq $role "head") }}
  securityContext: {{ toYaml $values.podSecurityContext | nindent 4 }}
  {{- include "spray.pullSecrets" $root | nindent 2 }}
  {{- with $node.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with include "spray.scheduling" $node | trim }}
  {{- . | nindent 2 }}
  {{- end }}
  {{- if and $node.spread (ne $role "head") }}
  topologySpreadConstraints:
    - maxSkew: 1
      topologyKey: kubernetes.io/hostname
      whenUnsatisfiable: ScheduleAnyway
      labelSelector:
        matchLabels:
          {{- include "spray.podLabels" $root | nindent 10 }}
          ray.io/group: {{ $node.name }}
  {{- end }}
  {{- if and $values.demo.enabled (ne $role "head") }}
  initContainers:
    - name: demo-model
      image: {{ include "spray.image" $root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      command: [python, -m, workers.demo_models, /demo/qwen-image, --family, qwen-image]
      env:
        - {name: HOME, value: /home/spray}
      securityContext: {{ toYaml $values.securityContext | nindent 8 }}
      resources:
        requests: {cpu: 500m, memory: 2Gi}
        limits: {memory: 2Gi}
      volumeMounts:
        - {name: demo, mountPath: /demo}
        - {name: tmp, mountPath: /tmp}
        - {name: home, mountPath: /home/spray}
  {{- end }}
  containers:
    - name: {{ ternary "ray-head" "ray-worker" (eq $role "head") }}
      image: {{ include "spray.image" $root }}
      imagePullPolicy: {{ $values.image.pullPolicy }}
      ports:
        {{- if eq $role "head" }}
        - {name: gcs-server, containerPort: 6379}
        - {name: dashboard, containerPort: 8265}
        - {name: client, containerPort: 10001}
        - {name: as-metrics, containerPort: 44217}
        - {name: dash-metrics, containerPort: 44227}
        {{- end }}
        - {name: serve, containerPort: {{ $values.gateway.port }}}
        {{- with get $values.gateway "grpc_port" }}
        - {name: serve-grpc, containerPort: {{ . }}}
        {{- end }}
        - {name: metrics, containerPort: 8080}
        {{- /* Gateways and gangs export; the head has neither, and a target there would count as down. */}}
        {{- if and (get $values.metrics "port") (ne $role "head") }}
        - {name: spray-metrics, containerPort: {{ get $values.metrics "port" }}}
        {{- end }}
      env:
        {{- $own := dict }}{{ range $node.env }}{{ $_ := set $own .name true }}{{ end }}
        {{- range $name, $value := merge (dict "HOME" "/home/spray") $generated.environment }}
        {{- if not (hasKey $own $name) }}
        - {name: {{ $name }}, value: {{ $value | quote }}}
        {{- end }}
        {{- end }}
        {{- if and $values.hubToken.existingSecret (not (hasKey $own "HF_TOKEN")) }}
        - name: HF_TOKEN
          valueFrom:
            secretKeyRef: {name: {{ $values.hubToken.existingSecret }}, key: {{ $values.hubToken.key }}}
        {{- end }}
        {{- if and $values.jobs.existingSecret (eq $role "gateway") (not (hasKey $own "SPRAY_JOBS_URL")) }}
        - name: SPRAY_JOBS_URL
          valueFrom:
            secretKeyRef: {name: {{ $values.jobs.existingSecret }}, key: {{ $values.jobs.key }}}
        {{- end }}
        {{- with $node.env }}{{ toYaml . | nindent 8 }}{{ end }}
      {{- if and $values.outputs.s3.existingSecret (eq $role "gateway") }}
      envFrom:
        - secretRef: {name: {{ $values.outputs.s3.existingSecret }}}
      {{- end }}
      securityContext: {{ toYaml $values.securityContext | nindent 8 }}
      {{- /* KubeRay's numbers. A node without a gateway and without a gang's first rank has no proxy, so it is never
             ready: the service, which takes all ready nodes, must not send requests there. */}}
      {{- if ne $role "head" }}
      lifecycle:
        preStop:
          # Gangs and gateways go on elsewhere, and finish here what they compute.
          exec: {command: [python, -m, service.rollout.drain, {{ sub (int $values.upgrade.drainSeconds) 30 | quote }}]}
      {{- end }}
      livenessProbe:
        httpGet: {path: /api/local_raylet_healthz, port: 52365}
        initialDelaySeconds: 30
        timeoutSeconds: 5
        periodSeconds: 5
        failureThreshold: 120
      readinessProbe:
        {{- if eq $role "head" }}
        httpGet: {path: /api/gcs_healthz, port: dashboard}
        failureThreshold: 10
        {{- else }}
        httpGet: {path: /-/healthz, port: serve}
        failureThreshold: 1
        {{- end }}
        initialDelaySeconds: 10
        timeoutSeconds: 5
        periodSeconds: 5
      resources:
        requests:
          cpu: {{ $node.cpus }}
          memory: {{ $node.memory }}
          {{- if $node.gpus }}
          {{ $node.gpuResource }}: {{ $node.gpus }}
          {{- end }}
          {{- with $node.extraResources }}{{ toYaml . | nindent 10 }}{{ end }}
        limits:
          {{- if $node.limitCpus }}
          cpu: {{ $node.cpus }}
          {{- end }}
          memory: {{ $node.memory }}
          {{- if $node.gpus }}
          {{ $node.gpuResource }}: {{ $node.gpus }}
          {{- end }}
          {{- with $node.extraResources }}{{ toYaml . | nindent 10 }}{{ end }}
      volumeMounts:
        - {name: shm, mountPath: /dev/shm}
        - {name: tmp, mountPath: /tmp}
        - {name: home, mountPath: /home/spray}
        {{- if ne $role "head" }}
        - {name: models, mountPath: /models}
        {{- if $values.demo.enabled }}
        - {name: demo, mountPath: /demo}
        {{- end }}
        {{- end }}
        {{- if and (eq $role "head") (include "spray.stateClaim" $root) }}
        - {name: state, mountPath: /var/lib/spray}
        {{- end }}
        {{- if eq $role "gateway" }}
        {{- if $values.apiKeys.existingSecret }}
        - {name: api-keys, mountPath: /etc/spray/keys, readOnly: true}
        {{- end }}
        {{- if or $values.outputs.existingClaim $values.outputs.size }}
        - {name: outputs, mountPath: /outputs}
        {{- end }}
        {{- end }}
        {{- with $node.extraVolumeMounts }}{{ toYaml . | nindent 8 }}{{ end }}
  volumes:
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $node.sharedMemoryMiB }}Mi}
    - name: tmp
      emptyDir: {}
    - name: home
      emptyDir: {}
    {{- if ne $role "head" }}
    - name: models
      {{- if or $values.cache.existingClaim $values.cache.size }}
      persistentVolumeClaim:
        claimName: {{ default (printf "%s-models" (include "spray.fullname" $root)) $values.cache.existingClaim }}
      {{- else }}
      emptyDir: {sizeLimit: {{ $values.cache.ephemeralLimit }}}
      {{- end }}
    {{- if $values.demo.enabled }}
    - name: demo
      emptyDir: {sizeLimit: 1Gi}
    {{- end }}
    {{- end }}
    {{- if eq $role "head" }}
    {{- with include "spray.stateClaim" $root }}
    - name: state
      persistentVolumeClaim:
        claimName: {{ . }}
    {{- end }}
    {{- end }}
    {{- if eq $role "gateway" }}
    {{- with $values.apiKeys.existingSecret }}
    - name: api-keys
      secret: {secretName: {{ . }}}
    {{- end }}
    {{- if or $values.outputs.existingClaim $values.outputs.size }}
    - name: outputs
      persistentVolumeClaim:
        claimName: {{ default (printf "%s-outputs" (include "spray.fullname" $root)) $values.outputs.existingClaim }}
    {{- end }}
    {{- end }}
    {{- with $node.extraVolumes }}{{ toYaml . | nindent 4 }}{{ end }}
{{- end }}
