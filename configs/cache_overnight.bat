@echo off
rem configs\cache_overnight.bat style.toml motion.toml
rem
rem Caches several datasets in a row, pictures and clips first, captions second. The files are checked together before
rem anything is encoded, so start it and look at the first lines. A dataset whose media are at fault is left out and
rem named again at the end; the others are cached. Run it again after mending: only what is missing or has changed is
rem encoded. Paths are relative to the folder that you call it from; VAE and T5 in the environment name the model files.
rem Exit code: 0 if everything is cached, otherwise that of the script that failed.
setlocal

if "%VAE%"=="" set VAE=models\wan_2.1_vae.safetensors
if "%T5%"=="" set T5=models\models_t5_umt5-xxl-enc-bf16.pth

if "%~1"=="" (
  echo name the dataset files: configs\cache_overnight.bat style.toml motion.toml
  exit /b 2
)

python "%~dp0..\wan_cache_latents.py" --dataset_config %* --vae "%VAE%"
set LATENTS=%ERRORLEVEL%
if %LATENTS%==130 exit /b 130

python "%~dp0..\wan_cache_text_encoder_outputs.py" --dataset_config %* --t5 "%T5%" --batch_size 16
set TEXT=%ERRORLEVEL%

echo latents: exit code %LATENTS%, captions: exit code %TEXT%
if not %LATENTS%==0 exit /b %LATENTS%
exit /b %TEXT%
